// Products of rows with packed weights, whatever their format: tiles of sums, and what is left to do with these.
//
// A format is a struct in formats/ with
//   Dot                    how entries are multiplied (simd.h)
//   TILED                  whether entries are what the tiles of tiles.h multiply
//   CODED                  whether entries are codes, with a scale per output, outliers and a store
//   AHEAD                  how many tiles fetch the next panel meanwhile, each a line per step
//   entries(call, panel)   the panel as tiles read it
//   few(call, panel, sums) the products of a few rows with a panel whose entries never leave the registers, (rows, 32);
//                          false where that is not the faster way
//   TYPE, PADDING, entry_bytes, pack, look_up   see FormatKernels
// and where CODED: FLIP, what makes an entry code + 128 (exclusive or), and step(weight, panel, step, buffer), the
// entries of one step.
#pragma once

#include "activations.h"
#include "gemm.h"
#include "tiles.h"

namespace GOSSAMER_NS {

using namespace gossamer;

// Weights of the `used` columns of a panel, as numbers: (used, 32). `entries` are the panel's, or null where they are not
// at hand.
template <class Format>
GOSSAMER_NOINLINE void expand(const PackedWeight& w, int64_t panel, const uint8_t* entries, const int32_t* columns,
                              int64_t used, float* out) {
  const uint16_t* exact = w.store(panel);
  const float* scale = w.scale(panel);
  alignas(64) uint8_t buffer[STEP_BYTES];
  for (int64_t u = 0; u < used; ++u, out += PANEL) {
    const int64_t k = columns[u];
    if (w.place && w.place[k] >= 0) {
      const uint16_t* half = exact + w.place[k] * PANEL;
      for (int i = 0; i < PANEL; i += W) store(out + i, w.stored_type == Type::fp16 ? load_fp16(half + i) : load_bf16(half + i));
      continue;
    }
    const uint8_t* codes = entries ? entries + k / 4 * STEP_BYTES : Format::step(w, panel, k / 4, buffer);
    const int shift = static_cast<int>(k % 4 * 8);
    for (int i = 0; i < PANEL; i += W) {
      const I code = and_int(shift_right(load_int(codes + i * 4), shift) ^ set1_int(Format::FLIP), set1_int(255));
      store(out + i, mul(to_float(sub_int(code, set1_int(128))), load(scale + i)));
    }
  }
}

// Writes those of W columns of y from `column` on that y has.
GOSSAMER_NOINLINE inline void put_some(const LinearCall& c, float* y, int64_t column, F value) {
  float lane[W];
  store(lane, value);
  for (int64_t i = 0; column + i < c.y_columns; ++i) y[i] = c.add ? y[i] + lane[i] : lane[i];
}
GOSSAMER_INLINE void put(const LinearCall& c, int64_t row, int64_t column, F value) {
  float* y = c.y + row * c.y_stride + column;
  if (column + W > c.y_columns) return put_some(c, y, column, value);
  store(y, c.add ? add(load(y), value) : value);
}

// Lists the columns in which any row of the call has an outlier; how many.
inline int64_t list_outliers(const LinearCall& c) {
  const Prepared& x = *c.x;
  int64_t used = 0;
  for (int64_t m = c.first_row; m < c.last_row; ++m)
    for (int32_t j = 0; j < x.outliers[m]; ++j) {
      const int32_t column = x.columns[m * x.k + j];
      if (c.index[column] < 0) {
        c.index[column] = static_cast<int32_t>(used);
        c.used[used++] = column;
      }
    }
  return used;
}

// The epilogue of the sums (m1 - m0, 32) of rows [m0, m1) and a panel: scales, outliers, bias, addend, activation.
template <class Format>
GOSSAMER_NOINLINE void finish(const LinearCall& c, int64_t panel, int64_t m0, int64_t m1, const typename Format::Dot::Number* sums) {
  const PackedWeight& w = *c.weight;
  const Prepared& x = *c.x;
  for (int64_t m = m0; m < m1; ++m, sums += PANEL)
    for (int low = 0; low < 16; low += W) {
      const int high = 16 + low;
      F y0, y1;
      if constexpr (Format::CODED) {
        const I excess = set1_int(Format::Dot::excess * x.sum[m]);
        const float* scale = w.scale(panel);
        y0 = mul(mul(to_float(sub_int(load_int(sums + low), excess)), load(scale + low)), set1(x.scale[m]));
        y1 = mul(mul(to_float(sub_int(load_int(sums + high), excess)), load(scale + high)), set1(x.scale[m]));
        for (int32_t j = 0; j < x.outliers[m]; ++j) {
          const float* exact = c.scratch + c.index[x.columns[m * x.k + j]] * PANEL;
          const F value = set1(x.values[m * x.k + j]);
          y0 = fma(value, load(exact + low), y0);
          y1 = fma(value, load(exact + high), y1);
        }
      } else {
        y0 = load(sums + low);
        y1 = load(sums + high);
      }
      if (w.bias) {
        y0 = add(y0, load(w.bias + panel * PANEL + low));
        y1 = add(y1, load(w.bias + panel * PANEL + high));
      }
      if (c.addend) {
        const float* addend = c.addend + m * c.addend_stride + panel * PANEL;
        y0 = add(y0, load(addend + low));
        y1 = add(y1, load(addend + high));
      }
      if (c.gate == Activation::none) {
        put(c, m, panel * PANEL + low, y0);
        put(c, m, panel * PANEL + high, y1);
      } else {
        put(c, m, panel * 16 + low, mul(common_gate(y0, c.gate), y1));
      }
    }
}

template <class Format>
GOSSAMER_NOINLINE void multiply(const LinearCall& c) {
  using Dot = typename Format::Dot;
  const PackedWeight& w = *c.weight;
  const int64_t used = Format::CODED ? list_outliers(c) : 0;
  const int64_t rows = c.last_row - c.first_row;
  // behind the end of a row there may be anything, which is no number perhaps, but is a code
  const bool in_tiles = HAS_TILES && Format::TILED && (Format::CODED || w.steps % TILE_SIZE == 0);
  const int64_t most = in_tiles ? MOST_TILED : TILE, tiles = (rows + most - 1) / most;
  const int64_t a_bytes = c.x->stride * bytes_of(c.x->type);
  const uint8_t* a = static_cast<const uint8_t*>(c.x->data);
  alignas(64) typename Dot::Number sums[(MOST_TILED > TILE ? MOST_TILED : TILE) * PANEL];
  int64_t shaped = 0;
  for (int64_t panel = c.first_panel; panel < c.last_panel; ++panel) {
    if (Format::few(c, panel, sums)) {
      if constexpr (Format::CODED)
        if (used) expand<Format>(w, panel, nullptr, c.used, used, c.scratch);
      finish<Format>(c, panel, c.first_row, c.last_row, sums);
      continue;
    }
    const uint8_t* data = Format::entries(c, panel);
    const uint8_t* next = panel + 1 < c.last_panel ? w.panel(panel + 1) : nullptr;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m0 = c.first_row + rows * t / tiles, m1 = c.first_row + rows * (t + 1) / tiles;
      if (in_tiles) {
        const int height = static_cast<int>(m1 - m0);
        if (shaped != height) shape_tiles(height);
        shaped = height;
        if constexpr (Format::TILED)
          tile_products(data, a + m0 * a_bytes, a_bytes, w.steps, height, t == 0 ? next : nullptr, STEP_BYTES, sums, PANEL);
      } else {
        const uint8_t* ahead = next && t < Format::AHEAD ? next + t * w.steps * 64 : nullptr;
        for (int pass = 0; pass < PASSES; ++pass)
          tile_of<Dot>(static_cast<int>(m1 - m0), data + pass * W * 4, a + m0 * a_bytes, a_bytes, w.steps,
                       pass == 0 ? ahead : nullptr, sums + pass * W, PANEL);
      }
      // not before the first tile has read the panel: memory is read in order then
      if constexpr (Format::CODED)
        if (used && t == 0) expand<Format>(w, panel, data, c.used, used, c.scratch);
      finish<Format>(c, panel, m0, m1, sums);
    }
  }
  if (shaped) release_tiles();
  for (int64_t u = 0; u < used; ++u) c.index[c.used[u]] = -1;
}

template <class Format>
constexpr FormatKernels kernels_of() {
  return {.type = Format::TYPE,
          .scaled = Format::CODED,
          .padding = Format::PADDING,
          .entry_bytes = Format::entry_bytes,
          .pack = Format::pack,
          .multiply = multiply<Format>,
          .look_up = Format::look_up};
}

}  // namespace GOSSAMER_NS
