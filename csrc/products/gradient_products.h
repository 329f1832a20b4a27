// Products with rows of gradients, divided among threads.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/threads.h"

namespace gossamer {

// Divides the columns of G: work(first column, the one after the last, piece), in whole blocks of `block`. Pieces depend
// on nothing but the number of threads, so that sums over them are the same every time.
template <class Work>
void over_columns(const GradientRows& g, int64_t block, int pieces, int threads, const Work& work) {
  const int64_t blocks = (g.d + block - 1) / block;
  Phase phase;
  run_parallel(threads, [&](int) {
    phase.run(pieces, 1, [&](int64_t piece, int64_t) {
      const int64_t first = blocks * piece / pieces * block, last = std::min(blocks * (piece + 1) / pieces * block, g.d);
      if (first < last) work(first, last, piece);
    });
  });
}

// out (m) = G x
inline void dot_rows(const Kernels& kernels, const GradientRows& g, const float* x, double* out, int threads) {
  const int pieces = 4 * threads;
  std::vector<std::vector<double>> sums(pieces, std::vector<double>(g.m));
  over_columns(g, 4096, pieces, threads, [&](int64_t first, int64_t last, int64_t piece) {
    kernels.dot_rows(g, x, first, last, sums[piece].data());
  });
  std::fill(out, out + g.m, 0.0);
  for (const auto& each : sums)
    for (int64_t r = 0; r < g.m; ++r) out[r] += each[r];
}

// out (m, m) = G G^T
inline void gram(const Kernels& kernels, const GradientRows& g, double* out, int threads) {
  const int64_t scratch = GRAM_COLUMNS * ((g.m + 15) / 16 * 16);
  std::vector<std::vector<double>> sums(threads);
  over_columns(g, GRAM_COLUMNS, threads, threads, [&](int64_t first, int64_t last, int64_t piece) {
    std::vector<double>& sum = sums[piece];
    sum.resize(g.m * g.m + scratch);
    kernels.gram(g, first, last, sum.data(), sum.data() + g.m * g.m);
  });
  for (int64_t r = 0; r < g.m; ++r)
    for (int64_t c = r; c < g.m; ++c) {
      double sum = 0;
      for (const auto& each : sums)
        if (!each.empty()) sum += each[r * g.m + c];
      out[r * g.m + c] = out[c * g.m + r] = sum;
    }
}

// out (d) = G^T w
inline void combine_rows(const Kernels& kernels, const GradientRows& g, const float* w, float* out, int threads) {
  over_columns(g, 2048, 4 * threads, threads, [&](int64_t first, int64_t last, int64_t) {
    kernels.combine_rows(g, w, first, last, out);
  });
}

}  // namespace gossamer
