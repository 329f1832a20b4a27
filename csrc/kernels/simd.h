// Vectors of W floats or 32-bit integers, in one spelling for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(GOSSAMER_EMULATE)
#include "emulated_avx512.h"
#elif defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace GOSSAMER_NS {

#define GOSSAMER_INLINE inline __attribute__((always_inline))
#define GOSSAMER_NOINLINE __attribute__((noinline))
#define GOSSAMER_LAMBDA __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int W = 16;
using F = __m512;
using I = __m512i;
#elif defined(__AVX2__)
constexpr int W = 8;
using F = __m256;
using I = __m256i;
#else
constexpr int W = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
#endif

// A number that is known when a generic lambda is compiled.
template <int N>
struct Count {
  static constexpr int value = N;
};

// each(Count<0>{}), each(Count<1>{}), ...
template <int N, int AT = 0, class Each>
GOSSAMER_INLINE void repeat(const Each& each) {
  if constexpr (AT < N) {
    each(Count<AT>{});
    repeat<N, AT + 1>(each);
  }
}

// Has v computed by here: compilers sort sums into another order, in which more of what they are of has to be kept.
template <class V>
GOSSAMER_INLINE void keep_order(V& v) {
#if defined(__AVX2__) && !defined(GOSSAMER_EMULATE)
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}

// The same pointer, of which a compiler does not know it: what is read through it is read again, instead of being kept in a
// register, or on the stack, since it was read before.
template <class T>
GOSSAMER_INLINE const T* read_again(const T* p) {
  asm volatile("" : "+r"(p));  // volatile, or two of them would be one
  return p;
}

// --- memory ----------------------------------------------------------------------------------------------------------

GOSSAMER_INLINE F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
GOSSAMER_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

// To memory past the caches, without reading what was there: for what is not read again soon. p is aligned to a vector, and
// streamed() comes before others may read it.
GOSSAMER_INLINE void stream(float* p, F v) {
#if defined(GOSSAMER_EMULATE)
  store(p, v);
#elif defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
GOSSAMER_INLINE void streamed() {
#if defined(__AVX2__) && !defined(GOSSAMER_EMULATE)
  _mm_sfence();
#endif
}
GOSSAMER_INLINE I load_int(const void* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
GOSSAMER_INLINE void store_int(void* p, I v) { std::memcpy(p, &v, sizeof v); }

// The same four bytes in every lane.
GOSSAMER_INLINE I broadcast(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
#if defined(__AVX512F__)
  return _mm512_set1_epi32(x);
#elif defined(__AVX2__)
  return _mm256_set1_epi32(x);
#else
  return I{x, x, x, x};
#endif
}

GOSSAMER_INLINE F set1(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return F{x, x, x, x};
#endif
}
// The number of bits that are set. (std::popcount is a template of the standard library.)
GOSSAMER_INLINE int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

GOSSAMER_INLINE I set1_int(int32_t x) { return broadcast(&x); }

GOSSAMER_INLINE F zero() { return set1(0.0f); }
GOSSAMER_INLINE I zero_int() { return set1_int(0); }

// --- arithmetic ------------------------------------------------------------------------------------------------------

GOSSAMER_INLINE F add(F a, F b) { return a + b; }
GOSSAMER_INLINE F sub(F a, F b) { return a - b; }
GOSSAMER_INLINE F mul(F a, F b) { return a * b; }
GOSSAMER_INLINE F div(F a, F b) { return a / b; }

// a * b + c
GOSSAMER_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

GOSSAMER_INLINE F max(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

GOSSAMER_INLINE F min(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

GOSSAMER_INLINE F as_float(I v) { return reinterpret_cast<F>(v); }
GOSSAMER_INLINE I as_int(F v) { return reinterpret_cast<I>(v); }

GOSSAMER_INLINE I add_int(I a, I b) {
#if defined(__AVX512F__)
  return _mm512_add_epi32(a, b);
#elif defined(__AVX2__)
  return _mm256_add_epi32(a, b);
#else
  return a + b;
#endif
}
GOSSAMER_INLINE I sub_int(I a, I b) {
#if defined(__AVX512F__)
  return _mm512_sub_epi32(a, b);
#elif defined(__AVX2__)
  return _mm256_sub_epi32(a, b);
#else
  return a - b;
#endif
}
GOSSAMER_INLINE I and_int(I a, I b) {
#if defined(__AVX512F__)
  return _mm512_and_si512(a, b);
#elif defined(__AVX2__)
  return _mm256_and_si256(a, b);
#else
  return a & b;
#endif
}
GOSSAMER_INLINE I shift_left(I a, int n) {
#if defined(__AVX512F__)
  return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n));
#elif defined(__AVX2__)
  return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n));
#else
  return a << n;
#endif
}
// Zeros move in from the left.
GOSSAMER_INLINE I shift_right(I a, int n) {
#if defined(__AVX512F__)
  return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n));
#elif defined(__AVX2__)
  return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n));
#else
  typedef uint32_t U __attribute__((vector_size(16)));
  return reinterpret_cast<I>(reinterpret_cast<U>(a) >> n);
#endif
}

// By a number of bits that is known when this is compiled; negative shifts to the left. The second one fills with the sign.
template <int N>
GOSSAMER_INLINE I shift_right(I a) {
  if constexpr (N == 0) return a;
#if defined(__AVX512F__)
  return N > 0 ? _mm512_srli_epi32(a, N & 31) : _mm512_slli_epi32(a, -N & 31);
#elif defined(__AVX2__)
  return N > 0 ? _mm256_srli_epi32(a, N & 31) : _mm256_slli_epi32(a, -N & 31);
#else
  return N > 0 ? shift_right(a, N & 31) : a << (-N & 31);
#endif
}
template <int N>
GOSSAMER_INLINE I shift_right_signed(I a) {
#if defined(__AVX512F__)
  return _mm512_srai_epi32(a, N);
#elif defined(__AVX2__)
  return _mm256_srai_epi32(a, N);
#else
  return a >> N;
#endif
}

GOSSAMER_INLINE F abs(F v) { return as_float(and_int(as_int(v), set1_int(0x7fffffff))); }

GOSSAMER_INLINE F to_float(I v) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(v);
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(v);
#else
  return __builtin_convertvector(v, F);
#endif
}

// To the nearest integer, halves to even. |v| < 2^22.
GOSSAMER_INLINE I round_to_int(F v) {
#if defined(__AVX512F__)
  return _mm512_cvtps_epi32(v);
#elif defined(__AVX2__)
  return _mm256_cvtps_epi32(v);
#else
  const F magic = set1(12582912.0f);  // 1.5 * 2^23: the fraction falls off by the rounding of the addition
  return as_int(v + magic) - as_int(magic);
#endif
}

GOSSAMER_INLINE float reduce_add(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float lane[W], sum = 0;
  store(lane, v);
  for (int i = 0; i < W; ++i) sum += lane[i];
  return sum;
#endif
}
GOSSAMER_INLINE float reduce_max(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float lane[W];
  store(lane, v);
  float m = lane[0];
  for (int i = 1; i < W; ++i) m = lane[i] > m ? lane[i] : m;
  return m;
#endif
}
GOSSAMER_INLINE int32_t reduce_add_int(I v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(v);
#else
  int32_t lane[W], sum = 0;
  store_int(lane, v);
  for (int i = 0; i < W; ++i) sum += lane[i];
  return sum;
#endif
}

// `yes` in the lanes where a > b, `no` elsewhere (also where one of them is NaN).
GOSSAMER_INLINE F select_greater(F a, F b, F yes, F no) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
#elif defined(__AVX2__)
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
#else
  return a > b ? yes : no;
#endif
}

// Bit i is set where lane i of a is greater than that of b.
GOSSAMER_INLINE uint32_t greater_bits(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return bits;
#endif
}

// 0, 1, 2, ... W - 1
GOSSAMER_INLINE F iota() {
  static const float steps[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(steps);
}

// 2^x with a relative error below 2e-7 (DEGREE 6) or 4e-6 (DEGREE 4), for x below 127; what is below 2^-126 becomes 0,
// or denormal. Cody and Waite: 2^x = 2^n 2^f with |f| <= 1/2, and a polynomial for 2^f (a fit at Chebyshev nodes).
template <int DEGREE = 6>
GOSSAMER_INLINE F exp2(F x) {
  x = max(x, set1(-150.0f));  // -inf too
#if defined(__AVX512F__)
  const F n = _mm512_roundscale_ps(x, 0);
#else
  const I whole = round_to_int(x);
  const F n = to_float(whole);
#endif
  const F f = sub(x, n);
  F p;
  if constexpr (DEGREE == 4) {
    p = fma(set1(9.67604e-03f), f, set1(5.592204e-02f));
    p = fma(p, f, set1(2.4022107e-01f));
    p = fma(p, f, set1(6.9312103e-01f));
    p = fma(p, f, set1(1.00000008f));
  } else {
    p = fma(set1(1.546973197e-04f), f, set1(1.340043216e-03f));
    p = fma(p, f, set1(9.618025603e-03f));
    p = fma(p, f, set1(5.550327214e-02f));
    p = fma(p, f, set1(2.402265121e-01f));
    p = fma(p, f, set1(6.931472067e-01f));
    p = fma(p, f, set1(1.0f));
  }
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const F result = as_float(add_int(as_int(p), shift_left(whole, 23)));
  return select_greater(x, set1(-126.0f), result, zero());
#endif
}

// --- 16-bit numbers --------------------------------------------------------------------------------------------------

GOSSAMER_INLINE F load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#elif defined(__AVX2__)
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#else
  uint32_t lane[W];
  for (int i = 0; i < W; ++i) lane[i] = static_cast<uint32_t>(p[i]) << 16;
  return as_float(load_int(lane));
#endif
}

// To nearest, halves to even; a NaN stays one.
GOSSAMER_INLINE uint16_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
GOSSAMER_INLINE float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

GOSSAMER_INLINE void store_bf16(uint16_t* p, F v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &half, sizeof half);
#elif defined(__AVX512F__)
  const I bits = as_int(v);
  const I odd = and_int(shift_right(bits, 16), set1_int(1));
  const I rounded = shift_right(add_int(add_int(bits, set1_int(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const I kept = _mm512_or_si512(shift_right(bits, 16), set1_int(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, kept)));
#elif defined(__AVX2__)
  const I bits = as_int(v);
  const I odd = and_int(shift_right(bits, 16), set1_int(1));
  const F rounded = as_float(shift_right(add_int(add_int(bits, set1_int(0x7fff)), odd), 16));
  const F kept = as_float(_mm256_or_si256(shift_right(bits, 16), set1_int(0x40)));
  const I wide = as_int(_mm256_blendv_ps(rounded, kept, _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
#else
  float lane[W];
  store(lane, v);
  for (int i = 0; i < W; ++i) p[i] = bf16_bits(lane[i]);
#endif
}

GOSSAMER_INLINE float fp16_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  uint32_t wide;
  if (exponent == 31) {
    wide = sign | 0x7f800000 | (mantissa << 13);
  } else if (exponent) {
    wide = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float small = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&wide, &small, 4);
    wide |= sign;
  }
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
GOSSAMER_INLINE F load_fp16(const uint16_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float lane[W];
  for (int i = 0; i < W; ++i) lane[i] = fp16_value(p[i]);
  return load(lane);
#endif
}

GOSSAMER_INLINE F load_int8(const void* p) {
#if defined(__AVX512F__)
  return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  float lane[W];
  for (int i = 0; i < W; ++i) lane[i] = static_cast<const int8_t*>(p)[i];
  return load(lane);
#endif
}

// W unsigned 16-bit integers.
GOSSAMER_INLINE I load_uint16(const uint16_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return I{p[0], p[1], p[2], p[3]};
#endif
}

// In each byte the entry of the table of 16 bytes that the byte, at most 15, names.
#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
GOSSAMER_INLINE I look_up_bytes(const int8_t* table, I index) {
#if defined(__AVX512F__)
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
#elif defined(__AVX2__)
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
#elif defined(__ARM_FEATURE_DOTPROD)
  return reinterpret_cast<I>(vqtbl1q_s8(vld1q_s8(table), reinterpret_cast<uint8x16_t>(index)));
#endif
}
#else
GOSSAMER_NOINLINE inline I look_up_bytes(const int8_t* table, I index) {
  uint8_t bytes[4 * W];
  std::memcpy(bytes, &index, sizeof bytes);
  for (int i = 0; i < 4 * W; ++i) bytes[i] = static_cast<uint8_t>(table[bytes[i]]);
  std::memcpy(&index, bytes, sizeof bytes);
  return index;
}
#endif

// The low bytes of the lanes, which must lie in [-128, 127].
GOSSAMER_INLINE void store_int8(int8_t* p, I v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
#else
  int32_t lane[W];
  store_int(lane, v);
  for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(lane[i]);
#endif
}

// --- the products of packed panels -----------------------------------------------------------------------------------
// Every lane holds four bytes of one column of the weight: four int8, two bf16 or one fp32. They are multiplied with the
// four bytes of the activation, which are the same in all lanes, and added up. SUMS: how many sums of one row have to take
// turns, so that no product waits for the one before it; one sum where its order changes it, for rows in tiles of another
// height would come out differently.

#if defined(__AVX2__) && !defined(__AVX512F__)
// Signed weights times signed activations in [-127, 127], exact: |w| sign(w) a, in sums of two, which are at most
// 2 * 128 * 127 < 2^15.
GOSSAMER_INLINE I signed_dot(I sum, I weight, I activation) {
  const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(activation, weight));
  return add_int(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// Weights stored as code + 128 times signed activations, exact. The sums are `excess` times that of the activations above
// those of the codes.
struct Int8Dot {
  using Accumulator = I;
  using Number = int32_t;  // of a lane
  static constexpr int step = 4;  // entries per four bytes
#if defined(__AVX2__) && !defined(__AVX512F__)
  static constexpr int excess = 0;
  static constexpr int SUMS = 1;
#else
  static constexpr int excess = 128;
  static constexpr int SUMS = 4;
#endif
  static GOSSAMER_INLINE I start() { return zero_int(); }
  static GOSSAMER_INLINE I join(I a, I b) { return add_int(a, b); }
  static GOSSAMER_INLINE I dot(I sum, I weight, I activation) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sum, weight, activation);
#elif defined(__AVX512BW__)
    const I even = _mm512_and_si512(weight, _mm512_set1_epi16(0x00ff)), odd = _mm512_srli_epi16(weight, 8);
    const I a_even = _mm512_srai_epi16(_mm512_slli_epi16(activation, 8), 8), a_odd = _mm512_srai_epi16(activation, 8);
    return add_int(sum, add_int(_mm512_madd_epi16(even, a_even), _mm512_madd_epi16(odd, a_odd)));
#elif defined(__AVX2__)
    return signed_dot(sum, _mm256_xor_si256(weight, set1_int(static_cast<int32_t>(0x80808080))), activation);
#elif defined(__ARM_FEATURE_DOTPROD)
    // There is no mixed product: (w + 128) a = w a + 128 a, and w = (w + 128) ^ 0x80 as a signed byte.
    const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(reinterpret_cast<uint8x16_t>(weight), vdupq_n_u8(0x80)));
    const int8x16_t a = reinterpret_cast<int8x16_t>(activation);
    const int32x4_t ones = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), a);
    const int32x4_t with = vdotq_s32(reinterpret_cast<int32x4_t>(sum), w, a);
    return reinterpret_cast<I>(vaddq_s32(with, vshlq_n_s32(ones, 7)));
#else
    uint8_t w[4 * W];
    int8_t a[4 * W];
    std::memcpy(w, &weight, sizeof w);
    std::memcpy(a, &activation, sizeof a);
    for (int i = 0; i < W; ++i) {
      sum[i] += w[4 * i] * a[4 * i] + w[4 * i + 1] * a[4 * i + 1] + w[4 * i + 2] * a[4 * i + 2] + w[4 * i + 3] * a[4 * i + 3];
    }
    return sum;
#endif
  }
};

// Codes of weights, signed bytes or bytes of at most 127, times signed activations in [-127, 127], exact. With VNNI signed
// codes are multiplied as code + 128: the sum is 128 times that of the activations above what it should be.
#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
template <bool SIGNED>
GOSSAMER_INLINE I dot_bytes(I sum, I codes, I activation) {
#if defined(__AVX512VNNI__)
  if constexpr (SIGNED) codes = codes ^ set1_int(static_cast<int32_t>(0x80808080));
  return _mm512_dpbusd_epi32(sum, codes, activation);
#elif defined(__AVX512BW__)
  const I even = _mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 8), odd = _mm512_srai_epi16(codes, 8);
  const I a_even = _mm512_srai_epi16(_mm512_slli_epi16(activation, 8), 8), a_odd = _mm512_srai_epi16(activation, 8);
  return add_int(sum, add_int(_mm512_madd_epi16(even, a_even), _mm512_madd_epi16(odd, a_odd)));
#elif defined(__AVX2__)
  return signed_dot(sum, codes, activation);
#else
  return reinterpret_cast<I>(
      vdotq_s32(reinterpret_cast<int32x4_t>(sum), reinterpret_cast<int8x16_t>(codes), reinterpret_cast<int8x16_t>(activation)));
#endif
}
#else
// (A function of its own: written out in every step, it takes minutes to compile.)
template <bool SIGNED>
GOSSAMER_NOINLINE I dot_bytes(I sum, I codes, I activation) {
  int8_t w[4 * W], a[4 * W];
  std::memcpy(w, &codes, sizeof w);
  std::memcpy(a, &activation, sizeof a);
  for (int i = 0; i < W; ++i)
    sum[i] += w[4 * i] * a[4 * i] + w[4 * i + 1] * a[4 * i + 1] + w[4 * i + 2] * a[4 * i + 2] + w[4 * i + 3] * a[4 * i + 3];
  return sum;
}
#endif

struct Bf16Dot {
  using Accumulator = F;
  using Number = float;
  static constexpr int step = 2, SUMS = 1;
  static GOSSAMER_INLINE F start() { return zero(); }
  static GOSSAMER_INLINE F join(F a, F b) { return add(a, b); }
  static GOSSAMER_INLINE F dot(F sum, I weight, I activation) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weight), reinterpret_cast<__m512bh>(activation));
#else
    const I high = set1_int(static_cast<int32_t>(0xffff0000));
    sum = fma(as_float(shift_left(weight, 16)), as_float(shift_left(activation, 16)), sum);
    return fma(as_float(and_int(weight, high)), as_float(and_int(activation, high)), sum);
#endif
  }
};

struct FloatDot {
  using Accumulator = F;
  using Number = float;
  static constexpr int step = 1, SUMS = 1;
  static GOSSAMER_INLINE F start() { return zero(); }
  static GOSSAMER_INLINE F join(F a, F b) { return add(a, b); }
  static GOSSAMER_INLINE F dot(F sum, I weight, I activation) { return fma(as_float(weight), as_float(activation), sum); }
};

}  // namespace GOSSAMER_NS
