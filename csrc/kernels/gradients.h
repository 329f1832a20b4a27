// Products with rows of gradients, G (m, d): what inverse Fisher matrices are made of (gossamer.operators).
//
// A thread works on a range of columns. Rows are fp32 or bf16.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "transpose.h"

namespace GOSSAMER_NS {

using namespace gossamer;

// --- vectors of doubles ----------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int DW = 8;
typedef double D __attribute__((vector_size(64)));
#elif defined(__AVX2__)
constexpr int DW = 4;
typedef double D __attribute__((vector_size(32)));
#else
constexpr int DW = 2;
typedef double D __attribute__((vector_size(16)));
#endif

GOSSAMER_INLINE D load_double(const double* p) {
  D v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
GOSSAMER_INLINE void store_double(double* p, D v) { std::memcpy(p, &v, sizeof v); }
GOSSAMER_INLINE D broadcast_double(double x) { return D{} + x; }

// --- one entry, one vector -------------------------------------------------------------------------------------------

GOSSAMER_INLINE float entry(const float* p) { return *p; }
GOSSAMER_INLINE float entry(const uint16_t* p) { return bf16_value(*p); }
GOSSAMER_INLINE F entries_of(const float* p) { return load(p); }
GOSSAMER_INLINE F entries_of(const uint16_t* p) { return load_bf16(p); }

// Columns whose products are summed in fp32 before the sum is added to one in fp64.
constexpr int64_t DOT_COLUMNS = 4096;

// out (m) += G x over columns [first, last).
template <class Entry>
inline void dot_rows(const GradientRows& g, const float* x, int64_t first, int64_t last, double* out) {
  for (int64_t begin = first; begin < last; begin += DOT_COLUMNS) {
    const int64_t n = last - begin < DOT_COLUMNS ? last - begin : DOT_COLUMNS;
    for (int64_t r = 0; r < g.m; ++r) {
      const Entry* row = static_cast<const Entry*>(g.data) + r * g.stride + begin;
      const int64_t ahead = r + 1 < g.m ? g.stride : 0;
      F sum[4] = {zero(), zero(), zero(), zero()};
      int64_t i = 0;
      for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
          sum[u] = fma(entries_of(row + i + u * W), load(x + begin + i + u * W), sum[u]);
          __builtin_prefetch(row + i + u * W + ahead);  // the same columns of the next row: a new page to the processor
        }
      }
      double total = reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
      for (; i < n; ++i) total += static_cast<double>(entry(row + i)) * x[begin + i];
      out[r] += total;
    }
  }
}

// out (d) = G^T w over columns [first, last).
template <class Entry>
inline void combine_rows(const GradientRows& g, const float* w, int64_t first, int64_t last, float* out) {
  constexpr int64_t block = 2048;  // columns of the sum that stay in the nearest cache
  for (int64_t begin = first; begin < last; begin += block) {
    const int64_t n = last - begin < block ? last - begin : block;
    std::memset(out + begin, 0, n * sizeof(float));
    int64_t r = 0;
    const auto add_rows = [&](auto count) GOSSAMER_LAMBDA {
      constexpr int rows = decltype(count)::value;
      const Entry* row = static_cast<const Entry*>(g.data) + r * g.stride + begin;
      const int64_t ahead = r + 2 * rows <= g.m ? rows * g.stride : 0;
      int64_t i = 0;
      for (; i + W <= n; i += W) {
        F sum = load(out + begin + i);
#pragma GCC unroll 4
        for (int k = 0; k < rows; ++k) {
          sum = fma(entries_of(row + k * g.stride + i), set1(w[r + k]), sum);
          __builtin_prefetch(row + k * g.stride + i + ahead);
        }
        store(out + begin + i, sum);
      }
      for (; i < n; ++i)
        for (int k = 0; k < rows; ++k) out[begin + i] += entry(row + k * g.stride + i) * w[r + k];
    };
    for (; r + 4 <= g.m; r += 4) add_rows(Count<4>{});
    for (; r < g.m; ++r) add_rows(Count<1>{});
  }
}

// --- the Gram matrix -------------------------------------------------------------------------------------------------

constexpr int GRAM_WIDE = 2 * DW;                 // columns of a register tile
constexpr int GRAM_HIGH = DW == 8 ? 12 : DW == 4 ? 6 : 4;  // its rows

// Rows [row, row + GRAM_WIDE) of columns [begin, begin + n), column by column; rows beyond the last are 0.
template <class Entry>
inline void pack_rows(const GradientRows& g, int64_t row, int64_t begin, int64_t n, double* to) {
  const Entry* from = static_cast<const Entry*>(g.data) + row * g.stride + begin;
  int64_t k = 0;
#if defined(__AVX2__) || defined(__AVX512F__)
  static_assert(W == GRAM_WIDE);
  if (row + W <= g.m)
    for (; k + W <= n; k += W) {
      float lane[W];
#if defined(__AVX512F__)
      I square[W];
      for (int i = 0; i < W; ++i) square[i] = as_int(entries_of(from + i * g.stride + k));
#else
      F square[W];
      for (int i = 0; i < W; ++i) square[i] = entries_of(from + i * g.stride + k);
#endif
      transpose(square);
      for (int i = 0; i < W; ++i) {
        std::memcpy(lane, &square[i], sizeof lane);
        for (int j = 0; j < W; ++j) to[(k + i) * GRAM_WIDE + j] = lane[j];
      }
    }
#endif
  for (; k < n; ++k)
    for (int64_t i = 0; i < GRAM_WIDE; ++i) to[k * GRAM_WIDE + i] = row + i < g.m ? entry(from + i * g.stride + k) : 0;
}

// out (m, m) += G G^T over columns [first, last), in fp64, on and above the diagonal (below it, anything). `scratch` holds
// GRAM_COLUMNS columns of m numbers, m rounded up to 16.
template <class Entry>
inline void gram(const GradientRows& g, int64_t first, int64_t last, double* out, double* scratch) {
  const int64_t panels = (g.m + GRAM_WIDE - 1) / GRAM_WIDE;
  for (int64_t begin = first; begin < last; begin += GRAM_COLUMNS) {
    const int64_t n = last - begin < GRAM_COLUMNS ? last - begin : GRAM_COLUMNS;
    for (int64_t p = 0; p < panels; ++p) pack_rows<Entry>(g, p * GRAM_WIDE, begin, n, scratch + p * n * GRAM_WIDE);
    const auto row_of = [&](int64_t r) { return scratch + r / GRAM_WIDE * n * GRAM_WIDE + r % GRAM_WIDE; };
    const auto tile = [&](auto high, int64_t r, int64_t p) GOSSAMER_LAMBDA {
      constexpr int rows = decltype(high)::value;
      D sum[rows][2] = {};
      const double* right = scratch + p * n * GRAM_WIDE;
      const double* left[rows];
      for (int i = 0; i < rows; ++i) left[i] = row_of(r + i);
      for (int64_t k = 0; k < n; ++k) {
        const D low = load_double(right + k * GRAM_WIDE), up = load_double(right + k * GRAM_WIDE + DW);
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i) {
          const D x = broadcast_double(left[i][k * GRAM_WIDE]);
          sum[i][0] += x * low;
          sum[i][1] += x * up;
        }
      }
      double lane[GRAM_WIDE];
      for (int i = 0; i < rows; ++i) {
        store_double(lane, sum[i][0]);
        store_double(lane + DW, sum[i][1]);
        for (int64_t j = 0; j < GRAM_WIDE && p * GRAM_WIDE + j < g.m; ++j) out[(r + i) * g.m + p * GRAM_WIDE + j] += lane[j];
      }
    };
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t end = (p + 1) * GRAM_WIDE < g.m ? (p + 1) * GRAM_WIDE : g.m;  // rows below are mirrored
      int64_t r = 0;
      for (; r + GRAM_HIGH <= end; r += GRAM_HIGH) tile(Count<GRAM_HIGH>{}, r, p);
      for (; r < end; ++r) tile(Count<1>{}, r, p);
    }
  }
}

inline void dot_rows(const GradientRows& g, const float* x, int64_t first, int64_t last, double* out) {
  g.type == Type::bf16 ? dot_rows<uint16_t>(g, x, first, last, out) : dot_rows<float>(g, x, first, last, out);
}
inline void combine_rows(const GradientRows& g, const float* w, int64_t first, int64_t last, float* out) {
  g.type == Type::bf16 ? combine_rows<uint16_t>(g, w, first, last, out) : combine_rows<float>(g, w, first, last, out);
}
inline void gram(const GradientRows& g, int64_t first, int64_t last, double* out, double* scratch) {
  g.type == Type::bf16 ? gram<uint16_t>(g, first, last, out, scratch) : gram<float>(g, first, last, out, scratch);
}

}  // namespace GOSSAMER_NS
