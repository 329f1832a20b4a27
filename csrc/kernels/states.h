// Recurrent layers: short convolutions, and linear attention with a decay, token by token.
#pragma once

#include "activations.h"
#include "rows.h"

namespace GOSSAMER_NS {

using namespace gossamer;

// See ConvolutionCall. `count` channels, at most W, from `first` on.
inline void convolve_some(const ConvolutionCall& c, int64_t first, int64_t count) {
  const int64_t width = c.taps;
  F window[MOST_TAPS], weight[MOST_TAPS];
  const auto part = [&](const float* from) GOSSAMER_LAMBDA {
    float lane[W] = {};
    std::memcpy(lane, from + first, count * sizeof(float));
    return load(lane);
  };
  for (int64_t t = 0; t < width; ++t) {
    weight[t] = part(c.weight + t * c.channels);
    window[t] = t + 1 < width && c.before ? part(c.before + t * c.channels) : zero();
  }
  const auto keep = [&](float* to) GOSSAMER_LAMBDA {
    for (int64_t t = 0; t + 1 < width; ++t) {
      float lane[W];
      store(lane, window[t]);
      std::memcpy(to + t * c.channels + first, lane, count * sizeof(float));
    }
  };
  const F bias = c.bias ? part(c.bias) : zero();
  for (int64_t r = 0; r < c.rows; ++r) {
    const float* x = c.x + r * c.x_stride;
    window[width - 1] = c.factor ? mul(part(x), part(c.factor + r * c.x_stride)) : part(x);
    F sum = bias;
    for (int64_t t = 0; t < width; ++t) sum = fma(window[t], weight[t], sum);
    if (c.silu) sum = activated<Activation::silu>(sum);
    if (c.gate) sum = mul(sum, part(c.gate + r * c.x_stride));
    float lane[W];
    store(lane, sum);
    std::memcpy(c.y + r * c.y_stride + first, lane, count * sizeof(float));
    for (int64_t t = 0; t + 1 < width; ++t) window[t] = window[t + 1];
    if (c.kept && r + 1 == c.certain) keep(c.kept);
  }
  keep(c.after);
}

inline void convolve(const ConvolutionCall& c) {
  for (int64_t first = c.first; first < c.last; first += W) convolve_some(c, first, c.last - first < W ? c.last - first : W);
}

inline float inverse_length(const float* x, int64_t k) { return 1.0f / __builtin_sqrtf(square_sum(x, k) + 1e-6f); }

// The sums of k_i S_i, over the rows (dk, dv) of a state; `wide` is dv rounded up to W.
GOSSAMER_NOINLINE inline void recall(const float* state, const float* key, int64_t dk, int64_t wide, float* out) {
  int64_t d = 0;
  for (; d + 4 * W <= wide; d += 4 * W) {
    F a = zero(), b = zero(), c = zero(), e = zero();
    const float* row = state + d;
    for (int64_t i = 0; i < dk; ++i, row += wide) {
      const F k = set1(key[i]);
      a = fma(k, load(row), a);
      b = fma(k, load(row + W), b);
      c = fma(k, load(row + 2 * W), c);
      e = fma(k, load(row + 3 * W), e);
    }
    store(out + d, a);
    store(out + d + W, b);
    store(out + d + 2 * W, c);
    store(out + d + 3 * W, e);
  }
  for (; d < wide; d += W) {
    F a = zero();
    for (int64_t i = 0; i < dk; ++i) a = fma(set1(key[i]), load(state + i * wide + d), a);
    store(out + d, a);
  }
}

// to_i = decay from_i + k_i delta, and the sums of q_i to_i; the rows (dk, wide) of two states, which may be the same.
GOSSAMER_NOINLINE inline void renew(const float* from, float* to, const float* key, const float* query, float decay,
                                    const float* delta, int64_t dk, int64_t wide, float* out) {
  const F fade = set1(decay);
  int64_t d = 0;
  for (; d + 2 * W <= wide; d += 2 * W) {
    F a = zero(), b = zero();
    const F low = load(delta + d), high = load(delta + d + W);
    const float* old = from + d;
    float* row = to + d;
    for (int64_t i = 0; i < dk; ++i, old += wide, row += wide) {
      const F k = set1(key[i]), q = set1(query[i]);
      const F s = fma(k, low, mul(load(old), fade)), t = fma(k, high, mul(load(old + W), fade));
      store(row, s);
      store(row + W, t);
      a = fma(q, s, a);
      b = fma(q, t, b);
    }
    store(out + d, a);
    store(out + d + W, b);
  }
  for (; d < wide; d += W) {
    F a = zero();
    for (int64_t i = 0; i < dk; ++i) {
      const F s = fma(set1(key[i]), load(delta + d), mul(load(from + i * wide + d), fade));
      store(to + i * wide + d, s);
      a = fma(set1(query[i]), s, a);
    }
    store(out + d, a);
  }
}

inline void recur(const RecurrenceCall& c) {
  const int64_t dk = c.dk, dv = c.dv, wide = (dv + 31) / 32 * 32;
  float *scratch = c.scratch, *key = scratch + dk * wide, *query = key + dk, *delta = query + dk, *out = delta + wide;
  std::memset(delta, 0, wide * sizeof(float));
  const bool whole = wide == dv;  // then the first row reads the state where it is, and the last one leaves it there
  const auto keep = [&](const float* state, float* to) GOSSAMER_LAMBDA {
    for (int64_t i = 0; i < dk; ++i) std::memcpy(to + i * dv, state + i * wide, dv * sizeof(float));
  };
  const float* state = c.before;
  if (!whole || !c.before) {
    std::memset(scratch, 0, dk * wide * sizeof(float));
    for (int64_t i = 0; c.before && i < dk; ++i) std::memcpy(scratch + i * wide, c.before + i * dv, dv * sizeof(float));
    state = scratch;
  }
  for (int64_t r = 0; r < c.rows; ++r) {
    const float *q = c.q + r * c.x_stride, *k = c.k + r * c.x_stride, *v = c.v + r * c.x_stride;
    const float decay = c.decay[r * c.rate_stride], beta = c.beta[r * c.rate_stride];
    if (c.corrects) {
      scale_row(k, inverse_length(k, dk), nullptr, dk, key, false);
      scale_row(q, inverse_length(q, dk) / __builtin_sqrtf(static_cast<float>(dk)), nullptr, dk, query, false);
      recall(state, key, dk, wide, out);
      for (int64_t d = 0; d < dv; ++d) delta[d] = (v[d] - decay * out[d]) * beta;
    } else {
      for (int64_t d = 0; d < dv; ++d) delta[d] = v[d] * beta;
    }
    float* next = whole && r + 1 == c.rows ? c.after : scratch;
    renew(state, next, c.corrects ? key : k, c.corrects ? query : q, decay, delta, dk, wide, out);
    state = next;
    for (int64_t d = 0; d < dv; ++d) out[d] += c.skip * v[d];
    std::memcpy(c.y + r * c.y_stride, out, dv * sizeof(float));
    if (c.kept && r + 1 == c.certain) keep(state, c.kept);
  }
  if (state != c.after) keep(state, c.after);
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
