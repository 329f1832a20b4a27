// A token of a row of logits, drawn at random. The definition is that of gossamer/engine/sampling: top_k, top_p and min_p
// keep the logits from some threshold on, ties included, and the cumulative distribution of what is kept is inverted in
// the order of the vocabulary.
//
// Nothing is sorted. Each threshold is the smallest logit v such that what is larger weighs less than a limit: by number
// for top_k, by mass for top_p. Candidates are partitioned around one of them until none is left, and a bound that can be
// read off the row keeps most of the vocabulary from ever being a candidate.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace GOSSAMER_NS {

using namespace gossamer;

constexpr uint32_t ALL_LANES = (1u << (W - 1) << 1) - 1;
constexpr float LOWEST = -3.40282347e38f;

// exp((x - peak) / temperature)
struct Mass {
  F peak, scale;
  GOSSAMER_INLINE F operator()(F x) const { return exp2(mul(sub(x, peak), scale)); }
};

struct Number {
  GOSSAMER_INLINE F operator()(F) const { return set1(1.0f); }
};

// The first `left` lanes; -inf in the others.
GOSSAMER_INLINE F load_some(const float* x, int64_t left) {
  if (left >= W) return load(x);
  float lane[W];
  for (int i = 0; i < W; ++i) lane[i] = i < left ? x[i] : -__builtin_inff();
  return load(lane);
}
GOSSAMER_INLINE uint32_t lanes(int64_t left) { return left >= W ? ALL_LANES : (1u << left) - 1; }

// The lanes of v whose bit is set, one after the other, to `out`, which has room for W; returns how many.
GOSSAMER_INLINE int64_t pack_lanes(float* out, F v, uint32_t bits) {
#if defined(__AVX512F__)
  store(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), v));
  return __builtin_popcount(bits);
#else
  float lane[W];
  store(lane, v);
  int64_t count = 0;
  for (; bits; bits &= bits - 1) out[count++] = lane[__builtin_ctz(bits)];
  return count;
#endif
}

// The smallest float that is not below c.
inline float at_least(double c) {
  if (!(c > LOWEST)) return -__builtin_inff();
  const float x = static_cast<float>(c);
  return x < c ? __builtin_nextafterf(x, __builtin_inff()) : x;
}

// Those of n logits that are not below `least`, to `out`, which has room for W more; returns how many.
inline int64_t collect(const float* x, int64_t n, float least, float* out) {
  const F bound = set1(least);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += W) {
    const F v = load_some(x + i, n - i);
    const uint32_t bits = ~greater_bits(bound, v) & lanes(n - i);
    if (bits) count += pack_lanes(out + count, v, bits);
  }
  return count;
}

struct Weighed {
  double above, from;  // of what is larger than the pivot, and of that and what equals it
};

template <class Weight>
inline Weighed weigh(const float* x, int64_t n, float pivot, const Weight& weight) {
  const F p = set1(pivot);
  Weighed sum{0, 0};
  for (int64_t start = 0; start < n; start += SAMPLE_BLOCK) {
    const int64_t end = start + SAMPLE_BLOCK < n ? start + SAMPLE_BLOCK : n;
    F above = zero(), from = zero();
    for (int64_t i = start; i < end; i += W) {
      const F v = load_some(x + i, end - i), w = weight(v);
      above = add(above, select_greater(v, p, w, zero()));
      from = add(from, select_greater(p, v, zero(), w));
    }
    sum.above += reduce_add(above);
    sum.from += reduce_add(from);
  }
  return sum;
}

// The median of seven of x, so that a partition around it halves them more or less.
inline float middle(const float* x, int64_t n) {
  float some[7];
  for (int j = 0; j < 7; ++j) {
    const float v = x[(2 * j + 1) * n / 14];
    int place = j;
    for (; place > 0 && some[place - 1] > v; --place) some[place] = some[place - 1];
    some[place] = v;
  }
  return some[3];
}

// The smallest of the candidates of which the larger ones weigh less than `limit`; x has room for W more, and is used up.
template <class Weight>
inline float smallest_within(float* x, int64_t n, double limit, const Weight& weight) {
  float found = -__builtin_inff();
  double before = 0;  // the weight of what is above all candidates
  while (n > 0 && before < limit) {
    const float pivot = middle(x, n);
    const F p = set1(pivot);
    const Weighed sum = weigh(x, n, pivot, weight);
    const bool within = before + sum.above < limit;
    if (within) {
      found = pivot;
      before += sum.from;
    }
    int64_t count = 0;  // what is on the other side of the pivot stays; written where it has been read already
    for (int64_t i = 0; i < n; i += W) {
      const F v = load_some(x + i, n - i);
      const uint32_t bits = (within ? greater_bits(p, v) : greater_bits(v, p)) & lanes(n - i);
      if (bits) count += pack_lanes(x + count, v, bits);
    }
    n = count;
  }
  return found;
}

// The largest logit in each lane of each block, (blocks, W); returns how many. The k-th largest of them is not above the
// k-th largest of all.
inline int64_t lane_peaks(const float* x, int64_t n, float* out) {
  int64_t count = 0;
  for (int64_t start = 0; start < n; start += SAMPLE_BLOCK, count += W) {
    const int64_t end = start + SAMPLE_BLOCK < n ? start + SAMPLE_BLOCK : n;
    F largest = set1(-__builtin_inff());
    for (int64_t i = start; i < end; i += W) largest = max(largest, load_some(x + i, end - i));
    store(out + count, largest);
  }
  return count;
}

// What reaches it is kept.
inline float sample_threshold(const SampleCall& c, const Mass& mass, float* some) {
  const int64_t n = c.vocabulary;
  const float none = -__builtin_inff();
  const double temperature = c.temperature;
  const bool nucleus = c.top_p <= 1, first = c.top_k > 0 && c.top_k < n;
  float threshold = c.min_p > 0 ? at_least(c.peak + temperature * __builtin_log(c.min_p)) : none;
  const auto raise = [&](float to) GOSSAMER_LAMBDA { threshold = to > threshold ? to : threshold; };
  float least = none;  // of the candidates for top_p
  double total = 0;
  if (first) {
    // The mass that top_p refers to is that of all the k largest, whatever min_p drops.
    float bound = nucleus ? none : threshold;
    if (const int64_t peaks = (n + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK * W; c.top_k <= peaks) {
      const float kth = smallest_within(some, lane_peaks(c.logits, n, some), static_cast<double>(c.top_k), Number{});
      bound = kth > bound ? kth : bound;
    }
    const int64_t count = collect(c.logits, n, bound, some);
    least = smallest_within(some, count, static_cast<double>(c.top_k), Number{});
    if (nucleus) total = weigh(some, collect(c.logits, n, least, some), none, mass).above;
    raise(least);
  } else if (nucleus) {
    total = weigh(c.logits, n, none, mass).above;
    // If no logit below some bound has more than its share of what top_p leaves out, all of them may be left out.
    const double share = (1 - c.top_p) * total / static_cast<double>(n);
    least = at_least(c.peak + temperature * (__builtin_log(share) - 0.01));
  }
  if (nucleus) {
    const int64_t count = collect(c.logits, n, threshold > least ? threshold : least, some);
    raise(smallest_within(some, count, c.top_p * total, mass));
  }
  return threshold;
}

// The place where the cumulative sum of `mass` exceeds `uniform`, in [0, 1], of its total: never one without mass.
// `uniform` becomes how far into the mass of that place it falls.
template <class Real>
inline int64_t invert(const Real* mass, int64_t n, double& uniform) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += mass[i];
  const double last = __builtin_nextafter(total, 0.0), wanted = uniform * total, target = wanted < last ? wanted : last;
  double before = 0;
  int64_t i = 0;
  for (; i + 1 < n && !(before + mass[i] > target); ++i) before += mass[i];
  const double into = (target - before) / mass[i];
  uniform = into > 0 ? into < 1 ? into : 1 : 0;
  return i;
}

inline int64_t sample(const SampleCall& c) {
  const int64_t n = c.vocabulary, blocks = (n + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK;
  double* sum = static_cast<double*>(c.scratch);
  // The maximum goes first: dividing by a tiny temperature may overflow, but only to -inf.
  const Mass mass{set1(c.peak), set1(static_cast<float>(1.4426950408889634 / c.temperature))};
  const float threshold = sample_threshold(c, mass, reinterpret_cast<float*>(sum + blocks));
  const F least = set1(threshold);
  const auto kept = [&](F v) GOSSAMER_LAMBDA { return select_greater(least, v, zero(), mass(v)); };
  const bool truncated = threshold > -__builtin_inff();
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t start = b * SAMPLE_BLOCK, end = start + SAMPLE_BLOCK < n ? start + SAMPLE_BLOCK : n;
    F total = zero();
    for (int64_t i = start; i < end; i += W) {
      const F v = load_some(c.logits + i, end - i);
      if (truncated && greater_bits(least, v) == ALL_LANES) continue;
      total = add(total, kept(v));
    }
    sum[b] = reduce_add(total);
  }
  double uniform = c.uniform;
  const int64_t start = invert(sum, blocks, uniform) * SAMPLE_BLOCK;
  const int64_t size = start + SAMPLE_BLOCK < n ? SAMPLE_BLOCK : n - start;
  float of_block[SAMPLE_BLOCK];
  for (int64_t i = 0; i < size; i += W) store(of_block + i, kept(load_some(c.logits + start + i, size - i)));
  return start + invert(of_block, size, uniform);
}

}  // namespace GOSSAMER_NS
