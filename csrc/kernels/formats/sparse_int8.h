// Int8 weights without their zeros.
//
// Panels without their zeros: the codes that are left, one after the other, and a mask of where they stand. What is
// computed is what the panel with its zeros gives, to the bit: the sums are sums of the same integers.
#pragma once

#include "../gemm.h"

namespace GOSSAMER_NS {

using namespace gossamer;

// How expanded codes are multiplied, and what they are changed by (exclusive or) when they are expanded.
#if defined(__AVX2__) && !defined(__AVX512F__)
struct SparseDot : Int8Dot {  // codes are expanded as they are
  static GOSSAMER_INLINE I dot(I sum, I weight, I activation) { return signed_dot(sum, weight, activation); }
};
constexpr int EXPANDED = 0;
#else
using SparseDot = Int8Dot;  // code + 128
constexpr int EXPANDED = 128;
#endif

// A place in a sparse panel: the mask of the codes that come next, and the next that is not zero. Codes are signed.
struct Sparse {
  const uint8_t* mask;
  const uint8_t* code;
};

// The place where `step` begins.
inline Sparse sparse_at(const PackedWeight& w, int64_t panel, int64_t step) {
  const int64_t known = step / RANK_STEPS;
  Sparse place{w.panel(panel) + known * RANK_STEPS * MASK_BYTES, w.codes(panel) + w.rank(panel)[known]};
  for (int64_t k = known * RANK_STEPS; k < step; ++k, place.mask += MASK_BYTES) {
    uint64_t bits[2];
    std::memcpy(bits, place.mask, MASK_BYTES);
    place.code += count_bits(bits[0]) + count_bits(bits[1]);
  }
  return place;
}

#if defined(__AVX512VBMI2__)

// The next 64 codes, + 128.
GOSSAMER_INLINE I next(Sparse& place) {
  uint64_t bits;
  std::memcpy(&bits, place.mask, 8);
  I codes = load_int(place.code);
#if !defined(GOSSAMER_EMULATE)
  asm("" : "+v"(codes));  // in a register: expanding from memory is slow microcode on Zen 4
#endif
  place.mask += 8;
  place.code += count_bits(bits);
  return _mm512_xor_si512(_mm512_maskz_expand_epi8(bits, codes), set1_int(static_cast<int32_t>(0x80808080)));
}
// For a tile, which reads a panel in this order.
GOSSAMER_INLINE I entries(Sparse& panel, int64_t) { return next(panel); }

inline void inflate(Sparse place, int64_t steps, uint8_t* out) {
  for (int64_t i = 0; i < 2 * steps; ++i, out += 64) store_int(out, next(place));
}

#elif defined(__AVX2__)

// Which of the codes that come next goes to each place, by the mask of 8 places; 0x80 makes it zero. For the places
// that follow, `low` also holds how many codes these took, and `high` stands behind them: they add up to 16 places.
struct alignas(64) Places {
  uint8_t low[256][16], high[256][16];
  constexpr Places() : low(), high() {
    for (int mask = 0; mask < 256; ++mask) {
      uint8_t rank = 0;
      for (int i = 0; i < 8; ++i) {
        const bool set = mask >> i & 1;
        low[mask][i] = high[mask][8 + i] = set ? rank : 0x80;
        rank = static_cast<uint8_t>(rank + set);
      }
      for (int i = 0; i < 8; ++i) low[mask][8 + i] = rank;
    }
  }
};
constexpr Places PLACES;

// The next 16 codes.
GOSSAMER_INLINE __m128i next(Sparse& place) {
  uint16_t mask;
  std::memcpy(&mask, place.mask, 2);
  uint32_t bits = mask;
  asm("" : "+r"(bits));  // what counts 16 bits leaves the rest of its register, and so waits for what was there
  const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(PLACES.low[place.mask[0]]));
  const __m128i from = _mm_add_epi8(low, _mm_load_si128(reinterpret_cast<const __m128i*>(PLACES.high[place.mask[1]])));
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place.code));
  place.mask += 2;
  place.code += count_bits(bits);
  return _mm_shuffle_epi8(codes, from);
}

inline void inflate(Sparse place, int64_t steps, uint8_t* out) {
  const __m128i flip = _mm_set1_epi8(static_cast<char>(EXPANDED));
  for (int64_t i = 0; i < 8 * steps; ++i, out += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_xor_si128(next(place), flip));
}

#if !defined(__AVX512F__)
// The dot products of a few rows with the 32 columns of a panel, 8 in each sum: `sums` (ROWS, 32). Finding the places is
// most of the work, so the panel is walked once, unlike in a tile.
template <int ROWS>
GOSSAMER_NOINLINE void row_products(Sparse panel, const uint8_t* a, int64_t a_bytes, int64_t steps, int32_t* sums) {
  I sum[ROWS][4];
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[r][i] = SparseDot::start();
  for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m128i first = next(panel);
      const I codes = _mm256_inserti128_si256(_mm256_castsi128_si256(first), next(panel), 1);
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) sum[r][i] = SparseDot::dot(sum[r][i], codes, broadcast(a + r * a_bytes + k * 4));
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store_int(sums + r * PANEL + i * W, sum[r][i]);
}
#endif

#else

inline void inflate(Sparse place, int64_t steps, uint8_t* out) {
  for (int64_t i = 0; i < MASK_BYTES * steps; ++i, ++place.mask)
    for (int bit = 0; bit < 8; ++bit) {
      const uint8_t set = *place.mask >> bit & 1;
      *out++ = static_cast<uint8_t>((set ? *place.code : 0) ^ 0x80);
      place.code += set;
    }
}

#endif

struct SparseFormat {
  using Dot = SparseDot;
  static constexpr Type TYPE = Type::int8;
  static constexpr bool CODED = true, TILED = true;
  static constexpr uint8_t PADDING = 0;  // of the mask
  static constexpr int AHEAD = 1, FLIP = EXPANDED ^ 128;

  static int64_t entry_bytes(int64_t steps) { return steps * MASK_BYTES + (steps + RANK_STEPS - 1) / RANK_STEPS * 4; }
  static bool few(const LinearCall& c, int64_t panel, int32_t* sums) {
    [[maybe_unused]] const PackedWeight& w = *c.weight;
    [[maybe_unused]] const int64_t rows = c.last_row - c.first_row, stride = c.x->stride;
    [[maybe_unused]] const uint8_t* a = static_cast<const uint8_t*>(c.x->data) + c.first_row * stride;
#if defined(__AVX512VBMI2__)
    if (rows > TILE) return false;
    tile_of<Dot>(static_cast<int>(rows), sparse_at(w, panel, 0), a, stride, w.steps, nullptr, sums, PANEL);
    return true;
#elif defined(__AVX2__) && !defined(__AVX512F__)
    if (rows == 1) row_products<1>(sparse_at(w, panel, 0), a, stride, w.steps, sums);
    if (rows == 2) row_products<2>(sparse_at(w, panel, 0), a, stride, w.steps, sums);
    return rows <= 2;
#else
    (void)panel, (void)sums;
    return false;
#endif
  }

  static const uint8_t* entries(const LinearCall& c, int64_t panel) {
    inflate(sparse_at(*c.weight, panel, 0), c.weight->steps, c.entries);
    return c.entries;
  }

  static const uint8_t* step(const PackedWeight& w, int64_t panel, int64_t k, uint8_t* buffer) {
    inflate(sparse_at(w, panel, k), 1, buffer);
    return buffer;
  }

  // Zeros are dropped from an int8 weight that is packed already: there is nothing to pack here.
  static constexpr decltype(FormatKernels::pack) pack = nullptr;
  static void look_up(const PackedWeight& w, int64_t n, float factor, float* out) {
    alignas(64) uint8_t buffer[STEP_BYTES];
    const float scale = w.scale(n / PANEL)[n % PANEL];
    for (int64_t k = 0; k < w.k; ++k) {
      if (k % 4 == 0) step(w, n / PANEL, k / 4, buffer);
      out[k] = static_cast<float>((buffer[n % PANEL * 4 + k % 4] ^ FLIP) - 128) * scale * factor;
    }
  }
};

}  // namespace GOSSAMER_NS
