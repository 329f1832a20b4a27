// Attention of many rows to the same keys, block by block, with a running softmax (FlashAttention, arXiv 2205.14135).
//
// A block of keys is packed like a weight, so that both products are those of gemm.h. Everything is in base 2: queries
// come multiplied with log2(e), and the state of a row is (max, sum of 2^(score - max)).
#pragma once

#include "linear.h"

namespace GOSSAMER_NS {

// --- packing ---------------------------------------------------------------------------------------------------------

// 32-bit words: (rows, words) with a stride in words -> (words, 32) for up to 32 rows; the others become 0.
inline void transpose_words(const uint32_t* from, int64_t stride, int64_t rows, int64_t words, uint32_t* to) {
  int64_t w = 0;
#if defined(__AVX512F__)
  for (int64_t half = 0; half < 32; half += 16) {
    for (w = 0; w + 16 <= words; w += 16) {
      I v[16], t[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = half + i < rows ? load_int(from + (half + i) * stride + w) : zero_int();
#pragma GCC unroll 8
      for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        store_int(to + (w + i) * PANEL + half, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        store_int(to + (w + i + 4) * PANEL + half, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        store_int(to + (w + i + 8) * PANEL + half, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
        store_int(to + (w + i + 12) * PANEL + half, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
      }
    }
  }
#endif
  for (; w < words; ++w) {
    for (int64_t r = 0; r < rows; ++r) to[w * PANEL + r] = from[r * stride + w];
    for (int64_t r = rows; r < PANEL; ++r) to[w * PANEL + r] = 0;
  }
}

// Values (n, D) -> panels of 32 dimensions, [keys / step][32][step]; keys are padded to a multiple of 32 with zeros.
template <class Dot, class Entry>
inline void pack_values(const Entry* values, int64_t n, int64_t dim, uint8_t* out) {
  const int64_t padded = (n + 31) / 32 * 32;
  for (int64_t d = 0; d < dim; d += PANEL) {
    const int64_t width = dim - d < PANEL ? dim - d : PANEL;
    for (int64_t key = 0; key < padded; key += Dot::step, out += STEP_BYTES) {
      uint32_t* word = reinterpret_cast<uint32_t*>(out);
      if (key + Dot::step > n || width < PANEL) {
        std::memset(out, 0, STEP_BYTES);
        for (int s = 0; s < Dot::step && key + s < n; ++s)
          for (int64_t i = 0; i < width; ++i)
            std::memcpy(out + 4 * i + s * sizeof(Entry), values + (key + s) * dim + d + i, sizeof(Entry));
      } else if constexpr (Dot::step == 1) {
        std::memcpy(word, values + key * dim + d, STEP_BYTES);
      } else {
        const Entry* first = values + key * dim + d;
        for (int i = 0; i < PANEL; ++i) word[i] = first[i] | static_cast<uint32_t>(first[dim + i]) << 16;
      }
    }
  }
}

GOSSAMER_INLINE void convert_shares(float* p, F v) { store(p, v); }
GOSSAMER_INLINE void convert_shares(uint16_t* p, F v) { store_bf16(p, v); }

// 2^x for x <= 0; what is below 2^-126, -inf too, becomes 0.
GOSSAMER_INLINE F exp2_or_zero(F x) { return select_greater(x, set1(-126.0f), exp2(x), zero()); }
GOSSAMER_INLINE float scalar_exp2(float x) {
  float lane[W];
  store(lane, exp2_or_zero(set1(x)));
  return lane[0];
}

// --- a task ----------------------------------------------------------------------------------------------------------

template <class Dot, class Entry>
inline void attend_rows(const AttentionTask& task) {
  const int64_t dim = task.dim, wide = (dim + 31) / 32 * 32, rows = task.rows * task.group;
  const int64_t block = attention_keys(dim), steps = dim / Dot::step, row_bytes = dim * sizeof(Entry);
  uint8_t* scratch = task.scratch;
  const auto take = [&](int64_t bytes) { uint8_t* p = scratch; scratch += bytes; return p; };
  uint8_t* q = take(ATTENTION_ROWS * wide * 4);
  float* out = reinterpret_cast<float*>(take(ATTENTION_ROWS * wide * 4));
  uint8_t* keys = take(block * wide * 4);
  uint8_t* values = take(block * wide * 4);
  float* scores = reinterpret_cast<float*>(take(8 * block * 4));
  Entry* shares = reinterpret_cast<Entry*>(take(8 * block * 4));
  int64_t* begin = reinterpret_cast<int64_t*>(take(ATTENTION_ROWS * 8));  // keys that a row sees
  int64_t* end = reinterpret_cast<int64_t*>(take(ATTENTION_ROWS * 8));
  float* peak = reinterpret_cast<float*>(take(ATTENTION_ROWS * 4));
  float* total = reinterpret_cast<float*>(take(ATTENTION_ROWS * 4));

  int64_t first = task.n, last = 0;
  for (int64_t i = 0; i < task.rows; ++i) {
    const int64_t token = task.tokens[i], position = task.position[token] - task.start;
    const Entry* source = static_cast<const Entry*>(task.q) + token * task.q_stride + task.head * dim;
    std::memcpy(q + i * task.group * row_bytes, source, task.group * row_bytes);
    const int64_t stop = position + 1 < task.n ? position + 1 : task.n;
    const int64_t go = task.window && position + 1 > task.window ? position + 1 - task.window : 0;
    for (int64_t g = 0; g < task.group; ++g) {
      begin[i * task.group + g] = go;
      end[i * task.group + g] = stop;
    }
    if (go < stop) {
      first = go < first ? go : first;
      last = stop > last ? stop : last;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    peak[r] = -__builtin_inff();
    total[r] = 0;
  }
  std::memset(out, 0, rows * wide * sizeof(float));

  const int64_t tiles = (rows + TILE - 1) / TILE;
  for (int64_t key = first / 32 * 32; key < last; key += block) {
    const int64_t count = last - key < block ? last - key : block, padded = (count + 31) / 32 * 32;
    const Entry* k = static_cast<const Entry*>(task.keys) + key * dim;
    for (int64_t p = 0; p < padded; p += PANEL)
      transpose_words(reinterpret_cast<const uint32_t*>(k + p * dim), row_bytes / 4, count - p < PANEL ? count - p : PANEL,
                      steps, reinterpret_cast<uint32_t*>(keys + p / PANEL * steps * STEP_BYTES));
    pack_values<Dot>(static_cast<const Entry*>(task.values) + key * dim, count, dim, values);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
      const int height = static_cast<int>(r1 - r0);
      bool seen = false, masked = padded != count;
      for (int64_t r = r0; r < r1; ++r) {
        seen |= begin[r] < key + count && end[r] > key && begin[r] < end[r];
        masked |= begin[r] > key || end[r] < key + count;
      }
      if (!seen) continue;
      for (int64_t p = 0; p < padded; p += PANEL)
        for (int pass = 0; pass < PASSES; ++pass)
          tile_of<Dot>(height, keys + p / PANEL * steps * STEP_BYTES + pass * W * 4, q + r0 * row_bytes, row_bytes, steps,
                       nullptr, [&](int r, F low, F high) GOSSAMER_LAMBDA {
            store(scores + r * block + p + pass * W, low);
            store(scores + r * block + p + 16 + pass * W, high);
          });
      float fade[8];  // what earlier blocks still count
      for (int r = 0; r < height; ++r) {
        float* s = scores + r * block;
        const int64_t row = r0 + r;
        F highest = set1(-__builtin_inff());
        if (masked) {
          const F low = set1(static_cast<float>(begin[row] - key)), high = set1(static_cast<float>(end[row] - key));
          for (int64_t i = 0; i < padded; i += W) {
            const F place = add(iota(), set1(static_cast<float>(i)));
            F v = select_greater(high, place, load(s + i), set1(-__builtin_inff()));
            v = select_greater(low, place, set1(-__builtin_inff()), v);
            store(s + i, v);
            highest = max(v, highest);
          }
        } else {
          for (int64_t i = 0; i < padded; i += W) highest = max(load(s + i), highest);
        }
        const float before = peak[row], found = reduce_max(highest), now = found > before ? found : before;
        if (!(now > -__builtin_inff())) {  // nothing seen yet
          fade[r] = 0;
          for (int64_t i = 0; i < padded; i += W) convert_shares(shares + r * block + i, zero());
          continue;
        }
        F sum = zero();
        for (int64_t i = 0; i < padded; i += W) {
          const F share = exp2_or_zero(sub(load(s + i), set1(now)));
          sum = add(sum, share);
          convert_shares(shares + r * block + i, share);
        }
        fade[r] = before > -__builtin_inff() ? scalar_exp2(before - now) : 0;
        peak[row] = now;
        total[row] = total[row] * fade[r] + reduce_add(sum);
      }
      for (int64_t d = 0; d < wide; d += PANEL)
        for (int pass = 0; pass < PASSES; ++pass)
          tile_of<Dot>(height, values + d / PANEL * (padded / Dot::step) * STEP_BYTES + pass * W * 4,
                       reinterpret_cast<const uint8_t*>(shares), block * sizeof(Entry), padded / Dot::step, nullptr,
                       [&](int r, F low, F high) GOSSAMER_LAMBDA {
            float* o = out + (r0 + r) * wide + d + pass * W;
            store(o, fma(load(o), set1(fade[r]), low));
            store(o + 16, fma(load(o + 16), set1(fade[r]), high));
          });
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = r / task.group, head = r % task.group;
    std::memcpy(task.out + token * task.out_stride + head * dim, out + r * wide, dim * sizeof(float));
    float* state = task.state + token * task.state_stride + 2 * head;
    state[0] = peak[r];
    state[1] = total[r];
  }
}

inline void attend(const AttentionTask& task) {
  if (task.type == Type::bf16) return attend_rows<Bf16Dot, uint16_t>(task);
  attend_rows<FloatDot, float>(task);
}

// --- around it -------------------------------------------------------------------------------------------------------

inline void merge(const float* const* parts, const float* const* states, int64_t count, int64_t dim, float* out) {
  float peak = states[0][0];
  for (int64_t i = 1; i < count; ++i) peak = states[i][0] > peak ? states[i][0] : peak;
  float total = 0;
  for (int64_t i = 0; i < count; ++i)
    if (states[i][1] > 0) total += states[i][1] * scalar_exp2(states[i][0] - peak);
  for (int64_t i = 0; i < count; ++i) {
    const float share = states[i][1] > 0 ? scalar_exp2(states[i][0] - peak) / total : 0.0f;
    scale_row(parts[i], share, nullptr, dim, out, i > 0);
  }
}

inline void rotate(const float* x, const float* cosine, const float* sine, int64_t dim, int64_t rotated, float scale,
                   void* out, Type type) {
  const int64_t half = rotated / 2, width = bytes_of(type);
  uint8_t* to = static_cast<uint8_t*>(out);
  const auto write = [&](int64_t i, F v) {
    v = mul(v, set1(scale));
    if (type == Type::bf16) store_bf16(reinterpret_cast<uint16_t*>(to + i * width), v);
    else store(reinterpret_cast<float*>(to) + i, v);
  };
  const auto write_one = [&](int64_t i, float v) { convert(&(v *= scale), 1, to + i * width, type); };
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const F a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i);
    write(i, sub(mul(a, c), mul(b, s)));
    write(half + i, fma(b, c, mul(a, s)));
  }
  for (; i < half; ++i) {
    write_one(i, x[i] * cosine[i] - x[half + i] * sine[i]);
    write_one(half + i, x[half + i] * cosine[i] + x[i] * sine[i]);
  }
  for (i = rotated; i < dim; ++i) write_one(i, x[i]);
}

}  // namespace GOSSAMER_NS
