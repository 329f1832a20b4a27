// Products with a matrix of exponentials of which only a tile is ever there: K_ij = 2^(-|q_i - k_j|^2), of differences because
// norms and products would cancel too many digits, or K_ij = 2^(row_i + q_i . k_j).
#pragma once

#include "kernels.h"
#include "simd.h"

namespace GOSSAMER_NS {

using namespace gossamer;

// Rows of a register tile; PANEL columns are walked through 2 W at a time.
constexpr int GAUSSIAN_TILE = W == 16 ? 12 : 6;
static_assert(GAUSSIAN_ROWS % GAUSSIAN_TILE == 0);

// Entries of GAUSSIAN_TILE rows, of which q holds [d][GAUSSIAN_TILE], and 2 W columns.
template <bool DIFFERENCES>
GOSSAMER_NOINLINE void exponentials(const float* q, const float* row, int64_t d, const float* panel, float* out) {
  F sum[GAUSSIAN_TILE][2];
#pragma GCC unroll 12
  for (int r = 0; r < GAUSSIAN_TILE; ++r)
    sum[r][0] = sum[r][1] = DIFFERENCES ? zero() : set1(row[r]);
#pragma GCC unroll 2
  for (int64_t k = 0; k < d; ++k) {
    const F low = load(panel + k * PANEL), high = load(panel + k * PANEL + W);
#pragma GCC unroll 12
    for (int r = 0; r < GAUSSIAN_TILE; ++r) {
      const F x = set1(q[k * GAUSSIAN_TILE + r]);
      if constexpr (DIFFERENCES) {
        const F a = sub(x, low), b = sub(x, high);
        sum[r][0] = fma(a, a, sum[r][0]);
        sum[r][1] = fma(b, b, sum[r][1]);
      } else {
        sum[r][0] = fma(x, low, sum[r][0]);
        sum[r][1] = fma(x, high, sum[r][1]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < GAUSSIAN_TILE; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
      store(out + r * GAUSSIAN_STRIDE + half * W, DIFFERENCES ? sub(zero(), sum[r][half]) : sum[r][half]);
#pragma GCC unroll 1
  for (int i = 0; i < 2 * GAUSSIAN_TILE; ++i) {
    float* exponent = out + i / 2 * GAUSSIAN_STRIDE + i % 2 * W;
    store(exponent, exp2(load(exponent)));
  }
}

// y (2 rows, COLUMNS) += two rows of entries times x (COLUMNS, n), n a multiple of PANEL; `square` takes entries squared.
template <int COLUMNS>
GOSSAMER_NOINLINE void dot_two(const float* entries, const float* x, int64_t n, bool square, double* y,
                             int64_t y_stride, bool second) {
  F sum[2][COLUMNS];
  for (int c = 0; c < COLUMNS; ++c) sum[0][c] = sum[1][c] = zero();
  for (int64_t j = 0; j < n; j += W) {
    F a = load(entries + j), b = load(entries + GAUSSIAN_STRIDE + j);
    if (square) a = mul(a, a), b = mul(b, b);
#pragma GCC unroll 6
    for (int c = 0; c < COLUMNS; ++c) {
      const F right = load(x + c * GAUSSIAN_KEYS + j);
      sum[0][c] = fma(a, right, sum[0][c]);
      sum[1][c] = fma(b, right, sum[1][c]);
    }
  }
  for (int c = 0; c < COLUMNS; ++c) {
    y[c] += reduce_add(sum[0][c]);
    if (second) y[y_stride + c] += reduce_add(sum[1][c]);
  }
}

inline void gaussian(const GaussianCall& call) {
  const int64_t d = call.d, padded = (call.rows + GAUSSIAN_TILE - 1) / GAUSSIAN_TILE * GAUSSIAN_TILE;
  float* q = call.scratch;
  float* row = q + GAUSSIAN_ROWS * d;
  float* x = row + GAUSSIAN_ROWS;
  float* entries = x + 6 * GAUSSIAN_KEYS;
  if (!call.ready) {
    for (int64_t r = 0; r < padded; ++r) {
      float* to = q + r / GAUSSIAN_TILE * GAUSSIAN_TILE * d + r % GAUSSIAN_TILE;
      for (int64_t k = 0; k < d; ++k) to[k * GAUSSIAN_TILE] = r < call.rows ? call.q[r * d + k] : 0;
      row[r] = r < call.rows && !call.differences ? call.row[r] : 0;
    }
  }

  for (int64_t first = call.first * PANEL; first < call.last * PANEL; first += GAUSSIAN_KEYS) {
    const int64_t n = call.last * PANEL - first < GAUSSIAN_KEYS ? call.last * PANEL - first : GAUSSIAN_KEYS;
    for (int64_t j = 0; j < n; j += 2 * W) {
      const float* panel = call.panels + (first + j) / PANEL * PANEL * d + j % PANEL;
      for (int64_t r = 0; r < padded; r += GAUSSIAN_TILE) {
        float* out = entries + r * GAUSSIAN_STRIDE + j;
        if (call.differences) {
          exponentials<true>(q + r * d, row + r, d, panel, out);
        } else {
          exponentials<false>(q + r * d, row + r, d, panel, out);
        }
      }
    }
    // Columns outside: six of them stay in the nearest cache, side by side.
    const auto dot = [&](auto count, int64_t c) GOSSAMER_LAMBDA {
      for (int i = 0; i < decltype(count)::value; ++i)
        std::memcpy(x + i * GAUSSIAN_KEYS, call.x + (c + i) * call.x_stride + first, n * sizeof(float));
      for (int64_t r = 0; r < call.rows; r += 2)
        dot_two<decltype(count)::value>(entries + r * GAUSSIAN_STRIDE, x, n, false, call.y + r * call.y_stride + c, call.y_stride,
                                        r + 1 < call.rows);
    };
    int64_t c = 0;
    for (; c + 6 <= call.columns; c += 6) dot(Count<6>{}, c);
    switch (call.columns - c) {
      case 5: dot(Count<5>{}, c); break;
      case 4: dot(Count<4>{}, c); break;
      case 3: dot(Count<3>{}, c); break;
      case 2: dot(Count<2>{}, c); break;
      case 1: dot(Count<1>{}, c); break;
    }
    if (call.w)
      for (int64_t r = 0; r < call.rows; r += 2)
        dot_two<1>(entries + r * GAUSSIAN_STRIDE, call.w + first, n, true, call.v + r * call.v_stride, call.v_stride,
                   r + 1 < call.rows);
  }
}

}  // namespace GOSSAMER_NS
