// Products of some rows of activations with one packed panel: the inner loop of linear layers and of attention.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace GOSSAMER_NS {

// Rows of a register tile: two accumulators each, and more than 16 of these would spill.
constexpr int TILE = W == 16 ? 8 : 4;
// A panel is walked in passes: pass p holds columns p W ... and 16 + p W ..., so that a gate and its factor meet.
constexpr int PASSES = 16 / W;

// Entries at a place of a panel.
GOSSAMER_INLINE I entries(const uint8_t* panel, int64_t at) { return load_int(panel + at); }

// The dot products of ROWS rows of `a` with columns [0, W) and [16, 16 + W) of `panel`, into sums + r * stride and 16
// behind it. `ahead`, unless null, is memory to fetch meanwhile, a line per step.
//
// A function of its own, which nothing inlines: its sums have the registers to themselves. Where a caller's variables
// lived beside them, compilers moved all of them to the stack and back in every step.
template <class Dot, int ROWS, class Panel>
GOSSAMER_NOINLINE void tile(Panel panel, const uint8_t* a, int64_t a_bytes, int64_t steps, const uint8_t* ahead,
                            typename Dot::Number* sums, int64_t stride) {
  using gossamer::STEP_BYTES;
  constexpr int SUMS = ROWS < Dot::SUMS ? Dot::SUMS / ROWS : 1;
  typename Dot::Accumulator sum[SUMS][ROWS][2];
#pragma GCC unroll 8
  for (int u = 0; u < SUMS; ++u)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sum[u][r][0] = sum[u][r][1] = Dot::start();
  int64_t k = 0;
  for (; k + SUMS <= steps; k += SUMS) {
#pragma GCC unroll 8
    for (int u = 0; u < SUMS; ++u) {
      const I low = entries(panel, (k + u) * STEP_BYTES), high = entries(panel, (k + u) * STEP_BYTES + 64);
      if (ahead) __builtin_prefetch(ahead + (k + u) * 64, 0, 2);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const I x = broadcast(a + r * a_bytes + (k + u) * 4);
        sum[u][r][0] = Dot::dot(sum[u][r][0], low, x);
        sum[u][r][1] = Dot::dot(sum[u][r][1], high, x);
      }
    }
  }
  for (; SUMS > 1 && k < steps; ++k) {
    const I low = entries(panel, k * STEP_BYTES), high = entries(panel, k * STEP_BYTES + 64);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const I x = broadcast(a + r * a_bytes + k * 4);
      sum[0][r][0] = Dot::dot(sum[0][r][0], low, x);
      sum[0][r][1] = Dot::dot(sum[0][r][1], high, x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    auto low = sum[0][r][0], high = sum[0][r][1];
#pragma GCC unroll 8
    for (int u = 1; u < SUMS; ++u) {
      low = Dot::join(low, sum[u][r][0]);
      high = Dot::join(high, sum[u][r][1]);
    }
    std::memcpy(sums + r * stride, &low, sizeof low);
    std::memcpy(sums + r * stride + 16, &high, sizeof high);
  }
}

// tile<> for `rows` of at most TILE.
template <class Dot, class Panel>
inline void tile_of(int rows, Panel panel, const uint8_t* a, int64_t a_bytes, int64_t steps, const uint8_t* ahead,
                    typename Dot::Number* sums, int64_t stride) {
  switch (rows) {
    case 1: return tile<Dot, 1>(panel, a, a_bytes, steps, ahead, sums, stride);
    case 2: return tile<Dot, 2>(panel, a, a_bytes, steps, ahead, sums, stride);
    case 3: return tile<Dot, 3>(panel, a, a_bytes, steps, ahead, sums, stride);
    case 4: return tile<Dot, 4>(panel, a, a_bytes, steps, ahead, sums, stride);
  }
  if constexpr (TILE == 8) {
    switch (rows) {
      case 5: return tile<Dot, 5>(panel, a, a_bytes, steps, ahead, sums, stride);
      case 6: return tile<Dot, 6>(panel, a, a_bytes, steps, ahead, sums, stride);
      case 7: return tile<Dot, 7>(panel, a, a_bytes, steps, ahead, sums, stride);
      case 8: return tile<Dot, 8>(panel, a, a_bytes, steps, ahead, sums, stride);
    }
  }
}

}  // namespace GOSSAMER_NS
