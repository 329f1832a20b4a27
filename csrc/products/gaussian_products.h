// Products with matrices of exponentials, divided among threads: exact over ranges of keys, sampled over the rest.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/threads.h"

namespace gossamer {

// Keys, packed: panels of PANEL, [d][PANEL].
struct GaussianKeys {
  const float* panels;
  int64_t padded;          // a multiple of PANEL
};

// Rows of queries, in tiles of consecutive ones that are treated alike.
struct GaussianQueries {
  int64_t rows, d;
  const float* q;          // (rows, d)
  const float* row;        // (rows)
  bool differences;
  int64_t tiles;
  const int64_t* start;    // (tiles + 1)
};

// A sample of keys in the order of their priorities, of which every tile takes as many as it wants from the first on.
struct GaussianSample {
  GaussianKeys keys;
  const float* x;          // (columns, keys.padded)
  const float* share;      // (keys.padded): a key is drawn by a tile with probability min(1, rate * share)
  const float* square;     // (keys.padded): |x_j|^2 over all columns
  const int32_t* block;    // (keys.padded): of keys, as in `near`
  int64_t blocks;
  const uint8_t* near;     // (tiles, blocks): 1 where a tile has the block's entries exactly
  const int64_t* count;    // (tiles)
  const double* rate;      // (tiles)
};

// Calls work(tile, first row, the one after the last, scratch of the thread) for pieces of at most GAUSSIAN_ROWS rows.
template <class Work>
void over_tiles(const GaussianQueries& queries, int threads, const Work& work) {
  struct Piece {
    int64_t tile, first, last;
  };
  std::vector<Piece> pieces;
  for (int64_t tile = 0; tile < queries.tiles; ++tile)
    for (int64_t r = queries.start[tile]; r < queries.start[tile + 1]; r += GAUSSIAN_ROWS)
      pieces.push_back({tile, r, std::min<int64_t>(r + GAUSSIAN_ROWS, queries.start[tile + 1])});
  Phase phase;
  run_parallel(threads, [&](int) {
    const WithoutDenormals now;
    std::vector<float> scratch(gaussian_scratch(queries.d));
    phase.run(static_cast<int64_t>(pieces.size()), 1, [&](int64_t at, int64_t) {
      work(pieces[at].tile, pieces[at].first, pieces[at].last, scratch.data());
    });
  });
}

inline GaussianCall rows_of(const GaussianQueries& queries, int64_t first, int64_t last, const GaussianKeys& keys, float* scratch) {
  GaussianCall call{};
  call.rows = last - first;
  call.d = queries.d;
  call.q = queries.q + first * queries.d;
  call.row = queries.row + first;
  call.differences = queries.differences;
  call.panels = keys.panels;
  call.scratch = scratch;
  return call;
}

// y (rows, columns) += K x over the ranges of panels of each tile, range[2 i] to range[2 i + 1] for i from range_start[tile]
// to range_start[tile + 1], for x (columns, keys.padded); and what a sample estimates of the rest, whose variance is added
// to v (rows).
inline void gaussian_products(const Kernels& kernels, const GaussianQueries& queries, const GaussianKeys& keys, const float* x,
                              int64_t columns, const int64_t* range_start, const int64_t* range, const GaussianSample* sample,
                              double* y, double* v, int threads) {
  over_tiles(queries, threads, [&](int64_t tile, int64_t first, int64_t last, float* scratch) {
    GaussianCall call = rows_of(queries, first, last, keys, scratch);
    call.x = x;
    call.x_stride = keys.padded;
    call.columns = call.y_stride = columns;
    call.y = y + first * columns;
    for (int64_t i = range_start[tile]; i < range_start[tile + 1]; ++i) {
      call.first = range[2 * i];
      call.last = range[2 * i + 1];
      kernels.gaussian(call);
      call.ready = true;
    }
    if (!sample || !sample->count[tile]) return;
    const int64_t n = (sample->count[tile] + PANEL - 1) / PANEL * PANEL;
    std::vector<float> z((columns + 1) * n, 0.0f);
    float* w = z.data() + columns * n;  // first 1 / p, or 0 for what is near
    const float rate = static_cast<float>(sample->rate[tile]);
    const uint8_t* near = sample->near + tile * sample->blocks;
    for (int64_t j = 0; j < sample->count[tile]; ++j)
      w[j] = near[sample->block[j]] ? 0.0f : std::max(1.0f, 1.0f / (rate * sample->share[j]));
    for (int64_t c = 0; c < columns; ++c) {
      const float* from = sample->x + c * sample->keys.padded;
      for (int64_t j = 0; j < sample->count[tile]; ++j) z[c * n + j] = from[j] * w[j];
    }
    for (int64_t j = 0; j < sample->count[tile]; ++j)  // |x|^2 (1 - p) / p^2
      w[j] = sample->square[j] * w[j] * std::max(0.0f, w[j] - 1);
    call.panels = sample->keys.panels;
    call.first = 0;
    call.last = n / PANEL;
    call.x = z.data();
    call.x_stride = n;
    call.w = w;
    call.v = v + first;
    call.v_stride = 1;
    kernels.gaussian(call);
  });
}

// Sums of entries (rows, blocks), and of their squares, over blocks of panels start[b] to start[b + 1]; `counted`
// (keys.padded) is 1 for keys and 0 for what fills a panel up.
inline void gaussian_sums(const Kernels& kernels, const GaussianQueries& queries, const GaussianKeys& keys, const float* counted,
                          int64_t blocks, const int64_t* start, double* sums, double* squares, int threads) {
  over_tiles(queries, threads, [&](int64_t, int64_t first, int64_t last, float* scratch) {
    GaussianCall call = rows_of(queries, first, last, keys, scratch);
    call.x = call.w = counted;
    call.columns = 1;
    call.y_stride = call.v_stride = blocks;
    for (int64_t b = 0; b < blocks; ++b) {
      call.first = start[b];
      call.last = start[b + 1];
      call.y = sums + first * blocks + b;
      call.v = squares + first * blocks + b;
      kernels.gaussian(call);
      call.ready = true;
    }
  });
}

}  // namespace gossamer
