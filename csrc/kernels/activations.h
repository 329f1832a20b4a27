// Functions of single numbers: the gates and activations of MLPs, and caps.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace GOSSAMER_NS {

using gossamer::Activation;

GOSSAMER_INLINE F sigmoid(F x) { return div(set1(1.0f), add(set1(1.0f), exp2(min(mul(x, set1(-1.44269504f)), set1(126.0f))))); }

// (1 + erf(x / sqrt(2))) / 2, within 1e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
GOSSAMER_INLINE F normal_distribution(F x) {
  const F size = mul(abs(x), set1(0.7071067812f)), t = div(set1(1.0f), fma(size, set1(0.3275911f), set1(1.0f)));
  F sum = fma(t, set1(1.061405429f), set1(-1.453152027f));
  sum = fma(sum, t, set1(1.421413741f));
  sum = fma(sum, t, set1(-0.284496736f));
  sum = mul(fma(sum, t, set1(0.254829592f)), t);
  const F tail = mul(mul(sum, set1(0.5f)), exp2(max(mul(mul(size, size), set1(-1.44269504f)), set1(-126.0f))));
  return select_greater(zero(), x, tail, sub(set1(1.0f), tail));
}

template <Activation BY>
GOSSAMER_INLINE F activated(F x) {
  if constexpr (BY == Activation::silu) return mul(x, sigmoid(x));
  if constexpr (BY == Activation::gelu) return mul(x, normal_distribution(x));
  if constexpr (BY == Activation::relu) return max(x, zero());
  if constexpr (BY == Activation::relu_squared) return mul(max(x, zero()), max(x, zero()));
  // x (1 + tanh(u)) / 2 = x sigmoid(2 u)
  const F u = mul(x, fma(mul(x, x), set1(0.044715f * 2 * 0.7978845608f), set1(2 * 0.7978845608f)));
  return mul(x, sigmoid(u));
}

// The gates that products of gated weights end with.
GOSSAMER_INLINE F common_gate(F x, Activation by) {
  return by == Activation::silu ? activated<Activation::silu>(x) : activated<Activation::gelu_tanh>(x);
}

// most tanh(x / most) = most (2 sigmoid(2 x / most) - 1)
GOSSAMER_INLINE F capped(F x, F most, F twice_inverse) { return mul(fma(sigmoid(mul(x, twice_inverse)), set1(2.0f), set1(-1.0f)), most); }

// x (k) = function(x), of vectors. The last few are padded.
template <class Function>
GOSSAMER_NOINLINE void apply_to_rest(float* x, int64_t k, Function function) {
  float rest[W] = {};
  std::memcpy(rest, x, k * sizeof(float));
  store(rest, function(load(rest)));
  std::memcpy(x, rest, k * sizeof(float));
}
template <class Function>
GOSSAMER_INLINE void apply(float* x, int64_t k, Function function) {
  int64_t i = 0;
  for (; i + W <= k; i += W) store(x + i, function(load(x + i)));
  if (i < k) apply_to_rest(x + i, k - i, function);
}

template <Activation BY>
GOSSAMER_NOINLINE void activate_all(float* x, int64_t k) {
  apply(x, k, [](F v) GOSSAMER_LAMBDA { return activated<BY>(v); });
}

inline void activate_row(float* x, int64_t k, Activation by) {
  switch (by) {
    case Activation::silu: return activate_all<Activation::silu>(x, k);
    case Activation::gelu: return activate_all<Activation::gelu>(x, k);
    case Activation::relu: return activate_all<Activation::relu>(x, k);
    case Activation::relu_squared: return activate_all<Activation::relu_squared>(x, k);
    default: return activate_all<Activation::gelu_tanh>(x, k);
  }
}

// x (k) = activation(x) * other. Clamped, as in gpt-oss (https://github.com/openai/gpt-oss): min(x, 7) sigmoid(1.702 x)
// (other + 1), with other in [-7, 7].
GOSSAMER_NOINLINE inline void clamped_gate(float* x, const float* other, int64_t k) {
  const F limit = set1(7.0f);
  for (int64_t i = 0; i + W <= k; i += W) {
    const F g = min(load(x + i), limit), u = max(min(load(other + i), limit), set1(-7.0f));
    store(x + i, mul(mul(g, sigmoid(mul(g, set1(1.702f)))), add(u, set1(1.0f))));
  }
}
GOSSAMER_NOINLINE inline void multiply_whole(float* x, const float* other, int64_t k) {
  for (int64_t i = 0; i + W <= k; i += W) store(x + i, mul(load(x + i), load(other + i)));
}
GOSSAMER_NOINLINE inline void gated(float* x, const float* other, int64_t k, Activation by) {
  const int64_t done = k / W * W;
  float a[W] = {}, b[W] = {};
  std::memcpy(a, x + done, (k - done) * sizeof(float));
  std::memcpy(b, other + done, (k - done) * sizeof(float));
  const auto one = [by](float* to, const float* from, int64_t n) {
    if (by == Activation::clamped) return clamped_gate(to, from, n);
    activate_row(to, n, by);
    multiply_whole(to, from, n);
  };
  one(x, other, done);
  one(a, b, W);
  std::memcpy(x + done, a, (k - done) * sizeof(float));
}

GOSSAMER_NOINLINE inline void cap(float* x, int64_t k, float most) {
  const F all = set1(most), twice_inverse = set1(2 / most);
  apply(x, k, [=](F v) GOSSAMER_LAMBDA { return capped(v, all, twice_inverse); });
}

}  // namespace GOSSAMER_NS
