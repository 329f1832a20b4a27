// The AVX-512 instructions that the kernels use, lane by lane, so that a processor without them can test what is written
// with them (`make emulate`). Meanings are those of Intel's Intrinsics Guide. Never part of an installed build.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VBMI2__ 1
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1

// Tiles would hold these dozens of times each, and compile for minutes.
#define APART __attribute__((noinline))

namespace emulated {

// The lanes of a vector, and back.
template <class Lane, class Vector>
struct Lanes {
  static constexpr int count = sizeof(Vector) / sizeof(Lane);
  Lane lane[count];
  Lanes() = default;
  explicit Lanes(const Vector& v) { std::memcpy(lane, &v, sizeof v); }
  Vector vector() const {
    Vector v;
    std::memcpy(&v, lane, sizeof v);
    return v;
  }
};
using F32 = Lanes<float, __m512>;
using I32 = Lanes<int32_t, __m512i>;
using U32 = Lanes<uint32_t, __m512i>;
using I16 = Lanes<int16_t, __m512i>;
using U16 = Lanes<uint16_t, __m512i>;
using I8 = Lanes<int8_t, __m512i>;
using U8 = Lanes<uint8_t, __m512i>;

template <class L, class Make>
auto each(const Make& make) {
  L out;
  for (int i = 0; i < L::count; ++i) out.lane[i] = static_cast<decltype(out.lane[0] + 0)>(make(i));
  return out.vector();
}

// to nearest, halves to even, as the processor rounds by default
inline uint16_t bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  if ((bits & 0x7f800000) == 0) return static_cast<uint16_t>(bits >> 31 << 15);  // denormals become zero
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float value(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline __m512 set1_ps(float x) { return each<F32>([&](int) { return x; }); }
inline __m512i set1_epi32(int32_t x) { return each<I32>([&](int) { return x; }); }
inline __m512i set1_epi16(int16_t x) { return each<I16>([&](int) { return x; }); }
template <class... X>
__m512i setr_epi32(X... x) {
  const int32_t all[] = {x...};
  return each<I32>([&](int i) { return all[i]; });
}

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  F32 x(a), y(b), z(c);
  return each<F32>([&](int i) { return std::fma(x.lane[i], y.lane[i], z.lane[i]); });
}
// the second operand where one is NaN
inline __m512 max_ps(__m512 a, __m512 b) {
  F32 x(a), y(b);
  return each<F32>([&](int i) { return x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i]; });
}
inline __m512 min_ps(__m512 a, __m512 b) {
  F32 x(a), y(b);
  return each<F32>([&](int i) { return x.lane[i] < y.lane[i] ? x.lane[i] : y.lane[i]; });
}
inline __m512 roundscale_ps(__m512 a, int) {
  F32 x(a);
  return each<F32>([&](int i) { return std::nearbyint(x.lane[i]); });
}
inline __m512 scalef_ps(__m512 a, __m512 b) {
  F32 x(a), y(b);
  return each<F32>([&](int i) { return std::ldexp(x.lane[i], static_cast<int>(std::floor(y.lane[i]))); });
}
inline float reduce_max_ps(__m512 a) {
  F32 x(a);
  for (int i = 1; i < 16; ++i) x.lane[0] = x.lane[i] > x.lane[0] ? x.lane[i] : x.lane[0];
  return x.lane[0];
}
// halves are added to halves
template <class L, class V>
auto reduce(V v) {
  L x(v);
  for (int half = L::count / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
  return x.lane[0];
}
inline float reduce_add_ps(__m512 a) { return reduce<F32>(a); }
inline int32_t reduce_add_epi32(__m512i a) { return static_cast<int32_t>(reduce<U32>(a)); }

inline __m512i add_epi32(__m512i a, __m512i b) {
  U32 x(a), y(b);
  return each<U32>([&](int i) { return x.lane[i] + y.lane[i]; });
}
inline __m512i sub_epi32(__m512i a, __m512i b) {
  U32 x(a), y(b);
  return each<U32>([&](int i) { return x.lane[i] - y.lane[i]; });
}
inline __m512i and_si512(__m512i a, __m512i b) {
  U32 x(a), y(b);
  return each<U32>([&](int i) { return x.lane[i] & y.lane[i]; });
}
inline __m512i or_si512(__m512i a, __m512i b) {
  U32 x(a), y(b);
  return each<U32>([&](int i) { return x.lane[i] | y.lane[i]; });
}
inline __m512i xor_si512(__m512i a, __m512i b) {
  U32 x(a), y(b);
  return each<U32>([&](int i) { return x.lane[i] ^ y.lane[i]; });
}
inline __m512i slli_epi32(__m512i a, int n) {
  U32 x(a);
  return each<U32>([&](int i) { return n > 31 ? 0 : x.lane[i] << n; });
}
inline __m512i sll_epi32(__m512i a, __m128i n) { return slli_epi32(a, _mm_cvtsi128_si32(n)); }
inline __m512i srl_epi32(__m512i a, __m128i n) {
  U32 x(a);
  const int by = _mm_cvtsi128_si32(n);
  return each<U32>([&](int i) { return by > 31 ? 0 : x.lane[i] >> by; });
}
inline __m512i srli_epi32(__m512i a, int n) { return srl_epi32(a, _mm_cvtsi32_si128(n)); }
inline __m512i srai_epi32(__m512i a, int n) {
  I32 x(a);
  return each<I32>([&](int i) { return x.lane[i] >> n; });
}
inline __m512i broadcast_i32x4(__m128i a) {
  Lanes<uint32_t, __m128i> x(a);
  return each<U32>([&](int i) { return x.lane[i % 4]; });
}
inline __m512i shuffle_epi8(__m512i a, __m512i index) {
  U8 x(a), place(index);
  return each<U8>([&](int i) { return place.lane[i] & 128 ? 0 : x.lane[i / 16 * 16 + place.lane[i] % 16]; });
}
inline __m512i slli_epi16(__m512i a, int n) {
  U16 x(a);
  return each<U16>([&](int i) { return x.lane[i] << n; });
}
inline __m512i srli_epi16(__m512i a, int n) {
  U16 x(a);
  return each<U16>([&](int i) { return x.lane[i] >> n; });
}
inline __m512i srai_epi16(__m512i a, int n) {
  I16 x(a);
  return each<I16>([&](int i) { return x.lane[i] >> n; });
}
inline __m512i madd_epi16(__m512i a, __m512i b) {
  I16 x(a), y(b);
  return each<I32>([&](int i) { return x.lane[2 * i] * y.lane[2 * i] + x.lane[2 * i + 1] * y.lane[2 * i + 1]; });
}
APART inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  I32 s(sum);
  U8 x(a);
  I8 y(b);
  return each<I32>([&](int i) {
    int32_t total = s.lane[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) total += x.lane[j] * y.lane[j];
    return total;
  });
}
// the odd products first, each step rounded
APART inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  F32 s(sum);
  Lanes<uint16_t, __m512bh> x(a), y(b);
  return each<F32>([&](int i) {
    const float odd = std::fma(value(x.lane[2 * i + 1]), value(y.lane[2 * i + 1]), s.lane[i]);
    return std::fma(value(x.lane[2 * i]), value(y.lane[2 * i]), odd);
  });
}

inline __m512i cvtps_epi32(__m512 a) {
  F32 x(a);
  return each<I32>([&](int i) {
    const float whole = std::nearbyint(x.lane[i]);
    return whole >= -2147483648.0f && whole < 2147483648.0f ? static_cast<int32_t>(whole) : INT32_MIN;
  });
}
inline __m512 cvtepi32_ps(__m512i a) {
  I32 x(a);
  return each<F32>([&](int i) { return static_cast<float>(x.lane[i]); });
}
inline __m512i cvtepi8_epi32(__m128i a) {
  Lanes<int8_t, __m128i> x(a);
  return each<I32>([&](int i) { return x.lane[i]; });
}
inline __m512i cvtepu16_epi32(__m256i a) {
  Lanes<uint16_t, __m256i> x(a);
  return each<U32>([&](int i) { return x.lane[i]; });
}
inline __m128i cvtepi32_epi8(__m512i a) {
  U32 x(a);
  return each<Lanes<uint8_t, __m128i>>([&](int i) { return static_cast<uint8_t>(x.lane[i]); });
}
inline __m256i cvtepi32_epi16(__m512i a) {
  U32 x(a);
  return each<Lanes<uint16_t, __m256i>>([&](int i) { return static_cast<uint16_t>(x.lane[i]); });
}
inline __m512 cvtph_ps(__m256i a) {
  Lanes<uint16_t, __m256i> x(a);
  return each<F32>([&](int i) { return _cvtsh_ss(x.lane[i]); });
}
inline __m256bh cvtneps_pbh(__m512 a) {
  F32 x(a);
  return each<Lanes<uint16_t, __m256bh>>([&](int i) { return bf16(x.lane[i]); });
}
// the second operand is the lower half of the result
inline __m512bh cvtne2ps_pbh(__m512 a, __m512 b) {
  F32 high(a), low(b);
  return each<Lanes<uint16_t, __m512bh>>([&](int i) { return bf16(i < 16 ? low.lane[i] : high.lane[i - 16]); });
}

template <class L, class V>
V unpack(V a, V b, int from) {  // within each 128 bits
  L x(a), y(b), out;
  constexpr int group = 16 / sizeof(x.lane[0]);
  for (int g = 0; g < L::count; g += group)
    for (int i = 0; i < group / 2; ++i) {
      out.lane[g + 2 * i] = x.lane[g + from * group / 2 + i];
      out.lane[g + 2 * i + 1] = y.lane[g + from * group / 2 + i];
    }
  return out.vector();
}
inline __m512 unpacklo_ps(__m512 a, __m512 b) { return unpack<F32>(a, b, 0); }
inline __m512 unpackhi_ps(__m512 a, __m512 b) { return unpack<F32>(a, b, 1); }
inline __m512i unpacklo_epi16(__m512i a, __m512i b) { return unpack<U16>(a, b, 0); }
inline __m512i unpackhi_epi16(__m512i a, __m512i b) { return unpack<U16>(a, b, 1); }
inline __m512i unpacklo_epi32(__m512i a, __m512i b) { return unpack<U32>(a, b, 0); }
inline __m512i unpackhi_epi32(__m512i a, __m512i b) { return unpack<U32>(a, b, 1); }
inline __m512i unpacklo_epi64(__m512i a, __m512i b) { return unpack<Lanes<uint64_t, __m512i>>(a, b, 0); }
inline __m512i unpackhi_epi64(__m512i a, __m512i b) { return unpack<Lanes<uint64_t, __m512i>>(a, b, 1); }

template <class V>
V shuffle(V a, V b, int select) {  // of 128 bits
  Lanes<__m128i, V> x(a), y(b), out;
  for (int i = 0; i < 4; ++i) out.lane[i] = (i < 2 ? x : y).lane[select >> (2 * i) & 3];
  return out.vector();
}
inline __m512 shuffle_f32x4(__m512 a, __m512 b, int select) { return shuffle(a, b, select); }
inline __m512i shuffle_i32x4(__m512i a, __m512i b, int select) { return shuffle(a, b, select); }
inline __m512 permutexvar_ps(__m512i order, __m512 a) {
  I32 from(order);
  F32 x(a);
  return each<F32>([&](int i) { return x.lane[from.lane[i] & 15]; });
}

inline uint16_t cmp_ps_mask(__m512 a, __m512 b, int kind) {
  F32 x(a), y(b);
  uint16_t bits = 0;
  for (int i = 0; i < 16; ++i) {
    const bool yes = kind == _CMP_GT_OQ ? x.lane[i] > y.lane[i] : x.lane[i] != x.lane[i] || y.lane[i] != y.lane[i];
    bits = static_cast<uint16_t>(bits | yes << i);
  }
  return bits;
}
inline __m512 mask_blend_ps(uint16_t mask, __m512 no, __m512 yes) {
  F32 x(no), y(yes);
  return each<F32>([&](int i) { return mask >> i & 1 ? y.lane[i] : x.lane[i]; });
}
inline __m512i mask_blend_epi32(uint16_t mask, __m512i no, __m512i yes) {
  U32 x(no), y(yes);
  return each<U32>([&](int i) { return mask >> i & 1 ? y.lane[i] : x.lane[i]; });
}
inline __m512 maskz_compress_ps(uint16_t mask, __m512 a) {
  F32 x(a), out(each<F32>([](int) { return 0.0f; }));
  for (int i = 0, to = 0; i < 16; ++i)
    if (mask >> i & 1) out.lane[to++] = x.lane[i];
  return out.vector();
}

APART inline __m512i maskz_expand_epi8(uint64_t mask, __m512i a) {
  U8 x(a), out(set1_epi32(0));
  for (int i = 0, from = 0; i < 64; ++i)
    if (mask >> i & 1) out.lane[i] = x.lane[from++];
  return out.vector();
}

}  // namespace emulated

// In the place of the compiler's own, which it refuses to use without the instructions.
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated::add_epi32
#undef _mm512_and_si512
#define _mm512_and_si512 emulated::and_si512
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 emulated::broadcast_i32x4
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 emulated::madd_epi16
#undef _mm512_mask_blend_epi32
#define _mm512_mask_blend_epi32 emulated::mask_blend_epi32
#undef _mm512_mask_blend_ps
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#undef _mm512_maskz_compress_ps
#define _mm512_maskz_compress_ps emulated::maskz_compress_ps
#undef _mm512_maskz_expand_epi8
#define _mm512_maskz_expand_epi8 emulated::maskz_expand_epi8
#undef _mm512_max_ps
#define _mm512_max_ps emulated::max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emulated::min_ps
#undef _mm512_or_si512
#define _mm512_or_si512 emulated::or_si512
#undef _mm512_permutexvar_ps
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated::scalef_ps
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 emulated::set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::set1_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 emulated::shuffle_epi8
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#undef _mm512_sll_epi32
#define _mm512_sll_epi32 emulated::sll_epi32
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 emulated::slli_epi16
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_srai_epi16
#define _mm512_srai_epi16 emulated::srai_epi16
#undef _mm512_srai_epi32
#define _mm512_srai_epi32 emulated::srai_epi32
#undef _mm512_srl_epi32
#define _mm512_srl_epi32 emulated::srl_epi32
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated::srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#undef _mm512_unpackhi_epi16
#define _mm512_unpackhi_epi16 emulated::unpackhi_epi16
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emulated::unpackhi_epi32
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emulated::unpackhi_epi64
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps emulated::unpackhi_ps
#undef _mm512_unpacklo_epi16
#define _mm512_unpacklo_epi16 emulated::unpacklo_epi16
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emulated::unpacklo_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emulated::unpacklo_epi64
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps emulated::unpacklo_ps
#undef _mm512_xor_si512
#define _mm512_xor_si512 emulated::xor_si512
