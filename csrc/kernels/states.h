// Recurrent layers: short convolutions, and linear attention with a decay, token by token.
#pragma once

#include "activations.h"
#include "rows.h"

namespace GOSSAMER_NS {

using namespace gossamer;

// y = bias + sum_t w_t z_t of one row, `width` channels of it, whose newest z = x factor is filled in; bias and factor may be
// null, and weights are `stride` apart.
GOSSAMER_NOINLINE inline void weigh(const float* x, const float* factor, const float* weight, int64_t stride, const float* bias,
                                    float* const* z, int64_t taps, int64_t width, float* y) {
  float* newest = z[taps - 1];
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    store(newest + i, factor ? mul(load(x + i), load(factor + i)) : load(x + i));
    F sum = bias ? load(bias + i) : zero();
    for (int64_t t = 0; t < taps; ++t) sum = fma(load(z[t] + i), load(weight + t * stride + i), sum);
    store(y + i, sum);
  }
  for (; i < width; ++i) {
    newest[i] = factor ? x[i] * factor[i] : x[i];
    float sum = bias ? bias[i] : 0.0f;
    for (int64_t t = 0; t < taps; ++t) sum += z[t][i] * weight[t * stride + i];
    y[i] = sum;
  }
}

// A row to a place that nobody reads in this step.
inline void put_away(const float* row, int64_t width, float* to) {
  if (reinterpret_cast<uintptr_t>(to) % (W * sizeof(float)) || width % W) {
    std::memcpy(to, row, width * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < width; i += W) stream(to + i, load(row + i));
}

// One row, of a text that has a state: its inputs are read where they are, and move up by one.
inline void convolve_one(const ConvolutionCall& c) {
  const int64_t width = c.last - c.first;
  alignas(64) float newest[CONVOLVED];
  float* z[MOST_TAPS];
  for (int64_t t = 0; t + 1 < c.taps; ++t) z[t] = const_cast<float*>(c.before) + t * c.channels + c.first;
  z[c.taps - 1] = newest;
  weigh(c.x + c.first, c.factor ? c.factor + c.first : nullptr, c.weight + c.first, c.channels,
        c.bias ? c.bias + c.first : nullptr, z, c.taps, width, c.y + c.first);
  if (c.silu) activate_row(c.y + c.first, width, Activation::silu);
  for (int64_t i = 0; c.gate && i < width; ++i) c.y[c.first + i] *= c.gate[c.first + i];
  for (int64_t t = 0; t + 1 < c.taps; ++t) put_away(z[t + 1], width, c.after + t * c.channels + c.first);
  streamed();
}

// See ConvolutionCall. Row by row, since a column of rows that are far apart is slow to read.
inline void convolve(const ConvolutionCall& c) {
  if (c.rows == 1 && c.before && !c.kept) return convolve_one(c);
  const int64_t width = c.last - c.first;
  alignas(64) float memory[MOST_TAPS][CONVOLVED];
  float* z[MOST_TAPS];
  for (int64_t t = 0; t < c.taps; ++t) {
    z[t] = memory[t];
    if (t + 1 == c.taps) break;
    if (c.before) std::memcpy(z[t], c.before + t * c.channels + c.first, width * sizeof(float));
    else std::memset(z[t], 0, width * sizeof(float));
  }
  const auto keep = [&](float* to) GOSSAMER_LAMBDA {
    for (int64_t t = 0; t + 1 < c.taps; ++t) std::memcpy(to + t * c.channels + c.first, z[t], width * sizeof(float));
  };
  for (int64_t r = 0; r < c.rows; ++r) {
    const float* x = c.x + r * c.x_stride + c.first;
    const float* gate = c.gate ? c.gate + r * c.x_stride + c.first : nullptr;
    float* y = c.y + r * c.y_stride + c.first;
    weigh(x, c.factor ? c.factor + r * c.x_stride + c.first : nullptr, c.weight + c.first, c.channels,
          c.bias ? c.bias + c.first : nullptr, z, c.taps, width, y);
    if (c.silu) activate_row(y, width, Activation::silu);
    for (int64_t i = 0; gate && i < width; ++i) y[i] *= gate[i];
    float* oldest = z[0];
    for (int64_t t = 0; t + 1 < c.taps; ++t) z[t] = z[t + 1];
    z[c.taps - 1] = oldest;
    if (c.kept && r + 1 == c.certain) keep(c.kept);
  }
  keep(c.after);
}

inline float inverse_length(const float* x, int64_t k) { return 1.0f / __builtin_sqrtf(square_sum(x, k) + 1e-6f); }

// Columns of a state, in vectors, that go through tokens together: as many as there are registers for, and as stay in the
// first cache; and of one token, and of one whose state goes away.
constexpr int COLUMNS = W == 16 ? 4 : 2, OF_ONE = W == 16 ? 8 : 4, TO_AWAY = 4;
constexpr int64_t BLOCK = COLUMNS * W;
static_assert(BLOCK <= 64 && OF_ONE * W <= RECURRENCE_COLUMNS && OF_ONE % TO_AWAY == 0);

// The sums of k_i S_i, over the rows (dk, wide) of a state.
template <int N>
GOSSAMER_NOINLINE void recall(const float* state, const float* key, int64_t dk, int64_t wide, float* out) {
  F sum[N];
  for (int n = 0; n < N; ++n) sum[n] = zero();
  for (int64_t i = 0; i < dk; ++i, state += wide) {
    const F k = set1(key[i]);
    for (int n = 0; n < N; ++n) sum[n] = fma(k, load(state + n * W), sum[n]);
  }
  for (int n = 0; n < N; ++n) store(out + n * W, sum[n]);
}

// One token: to_i = decay from_i + k_i delta, over the rows (dk, wide) of two states, which may be the same, and the sums of
// q_i to_i. With NEXT also those of next_i to_i: what the next token recalls, so that a state is gone through once for each.
// With AWAY `to` is another state, which nobody reads in this step.
template <int N, bool NEXT, bool AWAY = false>
GOSSAMER_NOINLINE void renew(const float* from, float* to, const float* key, const float* query, const float* next, float decay,
                             const float* delta, int64_t dk, int64_t wide, float* out, float* recalled) {
  const F fade = set1(decay);
  F added[N], sum[N], ahead[N];
  for (int n = 0; n < N; ++n) {
    added[n] = load(delta + n * W);
    sum[n] = ahead[n] = zero();
  }
  for (int64_t i = 0; i < dk; ++i, from += wide, to += wide) {
    const F k = set1(key[i]), q = set1(query[i]), f = NEXT ? set1(next[i]) : zero();
    for (int n = 0; n < N; ++n) {
      const F s = fma(k, added[n], mul(load(from + n * W), fade));
      if constexpr (AWAY) stream(to + n * W, s);
      else store(to + n * W, s);
      sum[n] = fma(q, s, sum[n]);
      if constexpr (NEXT) ahead[n] = fma(f, s, ahead[n]);
    }
  }
  for (int n = 0; n < N; ++n) {
    store(out + n * W, sum[n]);
    if constexpr (NEXT) store(recalled + n * W, ahead[n]);
  }
}

// Tokens of a text, at most RECURRENCE_TOKENS, with their keys and queries (tokens, dk) as they are multiplied.
struct Tokens {
  int64_t first, count;
  const float *keys, *queries;
  float* numbers;  // 3 RECURRENCE_COLUMNS
};

// N vectors of columns, from `d` on, go through tokens, or OF_ONE through one; `from` and `to` are these columns of a state, `stride` between rows.
template <int N, bool AWAY = false>
GOSSAMER_NOINLINE void pass(const RecurrenceCall& c, const Tokens& t, const float* from, float* to, int64_t d, int64_t stride) {
  float *delta = t.numbers, *out = delta + RECURRENCE_COLUMNS, *recalled = out + RECURRENCE_COLUMNS;
  const int64_t width = c.dv - d < N * W ? c.dv - d : N * W;
  std::memset(delta, 0, N * W * sizeof(float));
  if (c.corrects) recall<N>(from, t.keys, c.dk, stride, recalled);
  for (int64_t j = 0; j < t.count; ++j) {
    const int64_t row = t.first + j;
    const float decay = c.decay[row * c.rate_stride], beta = c.beta[row * c.rate_stride];
    const float *v = c.v + row * c.x_stride + d, *key = t.keys + j * c.dk, *query = t.queries + j * c.dk;
    for (int64_t e = 0; e < width; ++e) delta[e] = c.corrects ? (v[e] - decay * recalled[e]) * beta : v[e] * beta;
    if (N == COLUMNS && c.corrects && j + 1 < t.count)
      renew<COLUMNS, true>(from, to, key, query, key + c.dk, decay, delta, c.dk, stride, out, recalled);
    else
      renew<N, false, AWAY>(from, to, key, query, key, decay, delta, c.dk, stride, out, recalled);
    float* y = c.y + row * c.y_stride + d;
    for (int64_t e = 0; e < width; ++e) y[e] = out[e] + c.skip * v[e];
    from = to;
  }
}

// Keys and queries of the tokens from t.first on.
inline void read_tokens(const RecurrenceCall& c, const Tokens& t, float* keys, float* queries) {
  for (int64_t j = 0; j < t.count; ++j) {
    const float *k = c.k + (t.first + j) * c.x_stride, *q = c.q + (t.first + j) * c.x_stride;
    const float scale = c.corrects ? inverse_length(q, c.dk) / __builtin_sqrtf(static_cast<float>(c.dk)) : 1.0f;
    scale_row(k, c.corrects ? inverse_length(k, c.dk) : 1.0f, nullptr, c.dk, keys + j * c.dk, false);
    scale_row(q, scale, nullptr, c.dk, queries + j * c.dk, false);
  }
}

inline void recur(const RecurrenceCall& c) {
  const int64_t dk = c.dk, dv = c.dv, blocks = (dv + BLOCK - 1) / BLOCK;
  float *state = c.scratch, *keys = state + dk * blocks * BLOCK, *queries = keys + RECURRENCE_TOKENS * dk;
  Tokens t{.first = 0, .count = 1, .keys = keys, .queries = queries, .numbers = queries + RECURRENCE_TOKENS * dk};
  if (c.rows == 1 && c.before && !c.kept && dv % (OF_ONE * W) == 0) {  // from where the state is to where it goes
    read_tokens(c, t, keys, queries);
    const bool away = reinterpret_cast<uintptr_t>(c.after) % (W * sizeof(float)) == 0;
    const int64_t step = away ? TO_AWAY * W : OF_ONE * W;
    for (int64_t d = 0; d < dv; d += step)
      (away ? pass<TO_AWAY, true> : pass<OF_ONE, false>)(c, t, c.before + d, c.after + d, d, dv);
    streamed();
    return;
  }
  // Each block of columns lies together, so that it stays in the first cache while tokens pass.
  const auto copied = [&](auto&& copy) GOSSAMER_LAMBDA {
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < dk; ++i)
        copy(state + (b * dk + i) * BLOCK, i * dv + b * BLOCK, (dv - b * BLOCK < BLOCK ? dv - b * BLOCK : BLOCK) * sizeof(float));
  };
  const auto keep = [&](float* to) GOSSAMER_LAMBDA {
    copied([&](const float* own, int64_t at, size_t size) GOSSAMER_LAMBDA { std::memcpy(to + at, own, size); });
  };
  if (!c.before || dv % BLOCK) std::memset(state, 0, dk * blocks * BLOCK * sizeof(float));
  if (c.before) copied([&](float* own, int64_t at, size_t size) GOSSAMER_LAMBDA { std::memcpy(own, c.before + at, size); });
  for (; t.first < c.rows; t.first += t.count) {
    const int64_t end = c.kept && t.first < c.certain ? c.certain : c.rows;
    t.count = end - t.first < RECURRENCE_TOKENS ? end - t.first : RECURRENCE_TOKENS;
    read_tokens(c, t, keys, queries);
    for (int64_t b = 0; b < blocks; ++b) {
      float* own = state + b * dk * BLOCK;
      pass<COLUMNS>(c, t, own, own, b * BLOCK, BLOCK);
    }
    if (c.kept && t.first + t.count == c.certain) keep(c.kept);
  }
  keep(c.after);
}

template <bool SILU>
GOSSAMER_NOINLINE void gate_whole(float* x, const float* gate, int64_t k) {
  for (int64_t i = 0; i + W <= k; i += W) {
    const F g = load(gate + i), s = sigmoid(g);
    store(x + i, mul(load(x + i), SILU ? mul(g, s) : s));
  }
}

// x (k) *= silu(gate) or sigmoid(gate)
GOSSAMER_NOINLINE inline void gate_by(float* x, const float* gate, int64_t k, bool silu) {
  const auto whole = silu ? gate_whole<true> : gate_whole<false>;
  whole(x, gate, k);
  const int64_t done = k / W * W;
  if (done == k) return;
  float a[W] = {}, b[W] = {};
  std::memcpy(a, x + done, (k - done) * sizeof(float));
  std::memcpy(b, gate + done, (k - done) * sizeof(float));
  whole(a, b, W);
  std::memcpy(x + done, a, (k - done) * sizeof(float));
}

}  // namespace GOSSAMER_NS
