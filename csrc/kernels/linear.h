// Linear layers: weights are packed once, rows are made ready once per layer, and panels are multiplied.
#pragma once

#include "sparse.h"

namespace GOSSAMER_NS {

using namespace gossamer;

// --- packing ---------------------------------------------------------------------------------------------------------

inline float element(const void* source, Type type, int64_t i) {
  switch (type) {
    case Type::f32: return static_cast<const float*>(source)[i];
    case Type::bf16: return bf16_value(static_cast<const uint16_t*>(source)[i]);
    case Type::fp16: return fp16_value(static_cast<const uint16_t*>(source)[i]);
    case Type::int8: return static_cast<const int8_t*>(source)[i];
  }
  return 0;
}

inline void pack(PackedWeight& w, const void* source, Type type, int64_t rows, int64_t first, int64_t part, int64_t parts) {
  const int64_t step = step_of(w.type), size = bytes_of(w.type);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = packed_row(first + r, part, parts);
    uint8_t* column = w.panel(n / PANEL) + n % PANEL * 4;
    for (int64_t k = 0; k < w.k; ++k) {
      uint8_t* to = column + k / step * STEP_BYTES + k % step * size;
      if (w.type == Type::int8) {
        *to = static_cast<uint8_t>(static_cast<const int8_t*>(source)[r * w.k + k]) ^ 0x80;
      } else if (w.type == Type::bf16) {
        const uint16_t bits = type == Type::bf16 ? static_cast<const uint16_t*>(source)[r * w.k + k]
                                                 : bf16_bits(element(source, type, r * w.k + k));
        std::memcpy(to, &bits, 2);
      } else {
        const float x = element(source, type, r * w.k + k);
        std::memcpy(to, &x, 4);
      }
    }
  }
}

// --- rows ------------------------------------------------------------------------------------------------------------

inline float square_sum(const float* x, int64_t k) {
  F a = zero(), b = zero();
  int64_t i = 0;
  for (; i + 2 * W <= k; i += 2 * W) {
    a = fma(load(x + i), load(x + i), a);
    b = fma(load(x + i + W), load(x + i + W), b);
  }
  float sum = reduce_add(add(a, b));
  for (; i < k; ++i) sum += x[i] * x[i];
  return sum;
}

inline void scale_row(const float* x, float factor, const float* gain, int64_t k, float* out, bool add_to) {
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    F v = mul(load(x + i), set1(factor));
    if (gain) v = mul(v, load(gain + i));
    store(out + i, add_to ? add(load(out + i), v) : v);
  }
  for (; i < k; ++i) {
    const float v = gain ? x[i] * factor * gain[i] : x[i] * factor;
    out[i] = add_to ? out[i] + v : v;
  }
}

inline void convert(const float* x, int64_t n, void* out, Type type) {
  if (type == Type::f32) {
    std::memcpy(out, x, n * sizeof(float));
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(out);
  int64_t i = 0;
  for (; i + W <= n; i += W) store_bf16(half + i, load(x + i));
  for (; i < n; ++i) half[i] = bf16_bits(x[i]);
}

// Takes entry i of the row out of the int8 product.
inline void take_out(const Prepared& x, int64_t row, int64_t i, float* v) {
  const int32_t place = x.outliers[row]++;
  x.columns[row * x.k + place] = static_cast<int32_t>(i);
  x.values[row * x.k + place] = v[i];
  v[i] = 0;
}

// Entries of v (k) above what the criterion allows. `v` is padded to a multiple of W with zeros.
inline void find_outliers(const Prepared& x, int64_t row, float* v, float sum, const Decomposition& rule) {
  if (rule.extent == Extent::columns) {
    for (int64_t i = 0; i < x.k; ++i)
      if (rule.columns[i] && v[i] != 0) take_out(x, row, i, v);
    return;
  }
  float limit;
  if (rule.relative) {
    double total = sum;
    if (!(sum <= 3e38f)) {  // the sum does not fit into fp32, or there is a NaN
      total = 0;
      for (int64_t i = 0; i < x.k; ++i) total += v[i] < 0 ? -v[i] : v[i];
    }
    limit = rule.threshold * static_cast<float>(total / static_cast<double>(x.k));
  } else {
    uint32_t bits;  // greater than the next smaller number is at least the threshold
    std::memcpy(&bits, &rule.threshold, 4);
    --bits;
    std::memcpy(&limit, &bits, 4);
  }
  for (int64_t i = 0; i < x.k; i += W) {
    for (uint32_t found = greater_bits(abs(load(v + i)), set1(limit)); found; found &= found - 1)
      take_out(x, row, i + __builtin_ctz(found), v);
  }
}

inline void prepare(const Prepared& x, int64_t row, const float* source, float inverse, const float* gain,
                    const Decomposition& rule, float* v) {
  const int64_t k = x.k, padded = (k + W - 1) / W * W;
  if (x.type != Type::int8) {
    uint8_t* out = static_cast<uint8_t*>(x.data) + row * x.stride * bytes_of(x.type);
    if (inverse == 1 && !gain) return convert(source, k, out, x.type);
    scale_row(source, inverse, gain, k, v, false);
    return convert(v, k, out, x.type);
  }
  scale_row(source, inverse, gain, k, v, false);
  for (int64_t i = k; i < padded; ++i) v[i] = 0;
  F size = zero(), broken = zero();
  for (int64_t i = 0; i < padded; i += W) {
    size = add(size, abs(load(v + i)));
    broken = fma(load(v + i), zero(), broken);  // NaN as soon as an entry is NaN or infinite
  }
  int8_t* codes = static_cast<int8_t*>(x.data) + row * x.stride;
  x.outliers[row] = 0;
  const float nothing = reduce_add(broken);
  if (nothing != nothing) {  // the whole row becomes NaN
    std::memset(codes, 0, x.stride);
    x.scale[row] = nothing;
    x.sum[row] = 0;
    return;
  }
  if (rule.extent != Extent::none) find_outliers(x, row, v, reduce_add(size), rule);
  F largest = zero();
  for (int64_t i = 0; i < padded; i += W) largest = max(largest, abs(load(v + i)));
  const float scale = reduce_max(largest) / 127;
  x.scale[row] = scale;
  if (scale == 0) {
    std::memset(codes, 0, x.stride);
    x.sum[row] = 0;
    return;
  }
  I sum = zero_int();
  const F limit = set1(127.0f);
  int8_t last[W];
  for (int64_t i = 0; i < padded; i += W) {
    // a quotient beyond 127 comes from a scale that is denormal, and rounded itself
    const F quotient = max(min(div(load(v + i), set1(scale)), limit), sub(zero(), limit));
    const I code = round_to_int(quotient);
    sum = add_int(sum, code);
    if (i + W <= x.stride) {
      store_int8(codes + i, code);
    } else {
      store_int8(last, code);
      std::memcpy(codes + i, last, x.stride - i);
    }
  }
  x.sum[row] = reduce_add_int(sum);
}

// --- the product -----------------------------------------------------------------------------------------------------

GOSSAMER_INLINE F sigmoid(F x) { return div(set1(1.0f), add(set1(1.0f), exp2(min(mul(x, set1(-1.44269504f)), set1(126.0f))))); }

GOSSAMER_INLINE F activate(F x, Activation gate) {
  if (gate == Activation::silu) return mul(x, sigmoid(x));
  // x (1 + tanh(u)) / 2 = x sigmoid(2 u)
  const F u = mul(x, fma(mul(x, x), set1(0.044715f * 2 * 0.7978845608f), set1(2 * 0.7978845608f)));
  return mul(x, sigmoid(u));
}

// Weights of the `used` columns of a panel, as numbers: (used, 32). `entries` are the panel's, or null for those of a
// sparse one that are not at hand.
GOSSAMER_NOINLINE inline void expand(const PackedWeight& w, int64_t panel, const uint8_t* entries, const int32_t* columns,
                                             int64_t used, float* out) {
  const uint16_t* exact = w.store(panel);
  const float* scale = w.scale(panel);
  const I flip = set1_int(w.sparse() ? EXPANDED ^ 128 : 0);  // to code + 128
  alignas(64) uint8_t step[STEP_BYTES];
  for (int64_t u = 0; u < used; ++u, out += PANEL) {
    const int64_t k = columns[u];
    if (w.place && w.place[k] >= 0) {
      const uint16_t* half = exact + w.place[k] * PANEL;
      for (int i = 0; i < PANEL; i += W) store(out + i, w.stored_type == Type::fp16 ? load_fp16(half + i) : load_bf16(half + i));
      continue;
    }
    if (!entries) inflate(sparse_at(w, panel, k / 4), 1, step);
    const uint8_t* codes = entries ? entries + k / 4 * STEP_BYTES : step;
    const int shift = static_cast<int>(k % 4 * 8);
    for (int i = 0; i < PANEL; i += W) {
      const I code = and_int(shift_right(load_int(codes + i * 4), shift) ^ flip, set1_int(255));
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

// A format says how the entries of a panel become products.
//
// few(c, panel, sums): the products of a few rows with a panel whose entries never leave the registers, (rows, 32);
// false where that is not the faster way. entries(c, panel): the panel as tiles read it. AHEAD: how many tiles fetch the
// next panel, each a line per step.

struct Bf16Format {
  using Dot = Bf16Dot;
  static constexpr int AHEAD = 2;
  static bool few(const LinearCall&, int64_t, float*) { return false; }
  static const uint8_t* entries(const LinearCall& c, int64_t panel) { return c.weight->panel(panel); }
};

struct FloatFormat : Bf16Format {
  using Dot = FloatDot;
};

struct Int8Format {
  using Dot = Int8Dot;
  static constexpr int AHEAD = 2;
  static bool few(const LinearCall&, int64_t, int32_t*) { return false; }
  static const uint8_t* entries(const LinearCall& c, int64_t panel) { return c.weight->panel(panel); }
};

struct SparseFormat {
  using Dot = SparseDot;
  static constexpr int AHEAD = 1;

  static bool few(const LinearCall& c, int64_t panel, int32_t* sums) {
    [[maybe_unused]] const PackedWeight& w = *c.weight;
    [[maybe_unused]] const int64_t rows = c.last_row - c.first_row, stride = c.x->stride;
    [[maybe_unused]] const uint8_t* a = static_cast<const uint8_t*>(c.x->data) + c.first_row * stride;
#if defined(__AVX512VBMI2__)
    if (rows > TILE) return false;
    tile_of<Dot>(static_cast<int>(rows), sparse_at(w, panel, 0), a, stride, w.steps, nullptr, sums, PANEL);
    return true;
#elif defined(__AVX2__) && !defined(__AVX512F__)
    if (rows == 1) row_products<1>(sparse_at(w, panel, 0), a, stride, w.steps, sums);
    if (rows == 2) row_products<2>(sparse_at(w, panel, 0), a, stride, w.steps, sums);
    return rows <= 2;
#else
    (void)panel, (void)sums;
    return false;
#endif
  }

  static const uint8_t* entries(const LinearCall& c, int64_t panel) {
    inflate(sparse_at(*c.weight, panel, 0), c.weight->steps, c.entries);
    return c.entries;
  }
};

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

// What is left to do with the sums (m1 - m0, 32) of rows [m0, m1) and a panel: scales, outliers, bias, activation.
template <class Format>
GOSSAMER_NOINLINE void finish(const LinearCall& c, int64_t panel, int64_t m0, int64_t m1, const typename Format::Dot::Number* sums) {
  const PackedWeight& w = *c.weight;
  const Prepared& x = *c.x;
  for (int64_t m = m0; m < m1; ++m, sums += PANEL)
    for (int low = 0; low < 16; low += W) {
      const int high = 16 + low;
      F y0, y1;
      if constexpr (Format::Dot::step == 4) {
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
      if (c.gate == Activation::none) {
        put(c, m, panel * PANEL + low, y0);
        put(c, m, panel * PANEL + high, y1);
      } else {
        put(c, m, panel * 16 + low, mul(activate(y0, c.gate), y1));
      }
    }
}

template <class Format>
GOSSAMER_NOINLINE void multiply(const LinearCall& c) {
  using Dot = typename Format::Dot;
  const PackedWeight& w = *c.weight;
  const int64_t used = Dot::step == 4 ? list_outliers(c) : 0;
  const int64_t rows = c.last_row - c.first_row, tiles = (rows + TILE - 1) / TILE;
  const int64_t a_bytes = c.x->stride * bytes_of(c.x->type);
  const uint8_t* a = static_cast<const uint8_t*>(c.x->data);
  alignas(64) typename Dot::Number sums[TILE * PANEL];
  for (int64_t panel = c.first_panel; panel < c.last_panel; ++panel) {
    if (Format::few(c, panel, sums)) {
      if (used) expand(w, panel, nullptr, c.used, used, c.scratch);
      finish<Format>(c, panel, c.first_row, c.last_row, sums);
      continue;
    }
    const uint8_t* data = Format::entries(c, panel);
    const uint8_t* next = tiles > 1 && panel + 1 < c.last_panel ? w.panel(panel + 1) : nullptr;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m0 = c.first_row + rows * t / tiles, m1 = c.first_row + rows * (t + 1) / tiles;
      const uint8_t* ahead = next && t < Format::AHEAD ? next + t * w.steps * 64 : nullptr;
      for (int pass = 0; pass < PASSES; ++pass)
        tile_of<Dot>(static_cast<int>(m1 - m0), data + pass * W * 4, a + m0 * a_bytes, a_bytes, w.steps,
                     pass == 0 ? ahead : nullptr, sums + pass * W, PANEL);
      // not before the first tile has read the panel: memory is read in order then
      if (used && t == 0) expand(w, panel, data, c.used, used, c.scratch);
      finish<Format>(c, panel, m0, m1, sums);
    }
  }
  for (int64_t u = 0; u < used; ++u) c.index[c.used[u]] = -1;
}

inline void linear(const LinearCall& c) {
  switch (c.weight->type) {
    case Type::int8: return c.weight->sparse() ? multiply<SparseFormat>(c) : multiply<Int8Format>(c);
    case Type::bf16: return multiply<Bf16Format>(c);
    default: return multiply<FloatFormat>(c);
  }
}

inline int64_t argmax(const float* x, int64_t n) {
  F largest = set1(-__builtin_inff());
  I broken = zero_int();  // negative where a NaN was seen
  int64_t i = 0;
  const auto look = [&](F v) GOSSAMER_LAMBDA {
    largest = max(largest, v);
    const I beyond = sub_int(set1_int(0x7f800000), and_int(as_int(v), set1_int(0x7fffffff)));
    broken = beyond | broken;
  };
  for (; i + W <= n; i += W) look(load(x + i));
  if (i < n) {
    float rest[W];
    for (int j = 0; j < W; ++j) rest[j] = i + j < n ? x[i + j] : -__builtin_inff();
    look(load(rest));
  }
  int32_t lane[W];
  store_int(lane, broken);
  for (int j = 0; j < W; ++j)
    if (lane[j] < 0) return -1;
  const float best = reduce_max(largest);
  if (!(best > -__builtin_inff())) return -1;
  // the first of equals: find the block, then the place
  const F just_below = set1(best);
  for (i = 0; i + W <= n; i += W) {
    const F v = load(x + i);
    const uint32_t less = greater_bits(just_below, v), all = (1u << (W - 1) << 1) - 1;
    if (less != all) return i + __builtin_ctz(~less);
  }
  for (; x[i] != best; ++i) {}
  return i;
}

}  // namespace GOSSAMER_NS
