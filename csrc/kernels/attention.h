// Attention of many rows to the same keys, block by block, with a running softmax (FlashAttention, arXiv 2205.14135).
//
// A block of keys is packed like a weight, so that both products are those of gemm.h. Everything is in base 2: queries
// come multiplied with log2(e), and the state of a row is (max, sum of 2^(score - max)).
#pragma once

#include "activations.h"
#include "gemm.h"
#include "rows.h"
#include "tiles.h"
#include "transpose.h"

namespace GOSSAMER_NS {

// --- packing ---------------------------------------------------------------------------------------------------------

// 32-bit words: (rows, words) with a stride in words -> (words, 32) for up to 32 rows; the others become 0.
inline void transpose_words(const uint32_t* from, int64_t stride, int64_t rows, int64_t words, uint32_t* to) {
  int64_t w = 0;
#if defined(__AVX512F__)
  for (int64_t half = 0; half < 32 && rows == 32; half += 16) {
    for (w = 0; w + 16 <= words; w += 16) {
      I v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = load_int(from + (half + i) * stride + w);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store_int(to + (w + i) * PANEL + half, v[i]);
    }
  }
#elif defined(__AVX2__)
  for (int64_t part = 0; part < 32 && rows == 32; part += 8) {
    for (w = 0; w + 8 <= words; w += 8) {
      F v[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) v[i] = as_float(load_int(from + (part + i) * stride + w));
      transpose(v);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) store_int(to + (w + i) * PANEL + part, as_int(v[i]));
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

GOSSAMER_INLINE void store_entries(float* p, F v) { store(p, v); }
GOSSAMER_INLINE void store_entries(uint16_t* p, F v) { store_bf16(p, v); }

GOSSAMER_INLINE float scalar_exp2(float x) {
  float lane[W];
  store(lane, exp2(set1(x)));
  return lane[0];
}

// --- int8 keys and values --------------------------------------------------------------------------------------------

// A row as codes and a scale (kv_bytes): x ~ code * scale with scale = max|x| / 127. What is not finite makes it all NaN.
inline void quantize(const float* x, int64_t n, uint8_t* out) {
  const auto part = [&](int64_t i) GOSSAMER_LAMBDA {
    float lane[W] = {};
    std::memcpy(lane, x + i, (n - i < W ? n - i : W) * sizeof(float));
    return load(lane);
  };
  F largest = zero(), broken = zero();
  for (int64_t i = 0; i < n; i += W) {
    largest = max(abs(part(i)), largest);
    broken = fma(part(i), zero(), broken);
  }
  const float scale = reduce_max(largest) / 127 + reduce_add(broken);
  const F inverse = set1(scale > 1.2e-38f ? 1 / scale : 0);  // the inverse of a denormal number might be infinite
  for (int64_t i = 0; i < n; i += W) {
    int8_t codes[W];
    store_int8(codes, round_to_int(mul(part(i), inverse)));
    std::memcpy(out + i, codes, n - i < W ? n - i : W);
  }
  std::memcpy(out + n, &scale, 4);
}

GOSSAMER_INLINE F scale_of(const uint8_t* row, int64_t dim) { return as_float(broadcast(row + dim)); }

GOSSAMER_INLINE void put_entry(float* p, float v) { *p = v; }
GOSSAMER_INLINE void put_entry(uint16_t* p, float v) { *p = bf16_bits(v); }

// Stored rows -> (count, dim) in bf16 or fp32; what stands `ahead` bytes further on is fetched meanwhile.
template <class Entry>
inline void widen(const uint8_t* rows, int64_t count, int64_t dim, int64_t ahead, Entry* out) {
  for (int64_t r = 0; r < count; ++r, rows += kv_bytes(Type::int8, dim), out += dim) {
    const F scale = scale_of(rows, dim);
    int64_t i = 0;
    for (; i + W <= dim; i += W) {
      if (i % 64 == 0) __builtin_prefetch(rows + ahead + i);
      store_entries(out + i, mul(load_int8(rows + i), scale));
    }
    float factor;
    std::memcpy(&factor, rows + dim, 4);
    for (; i < dim; ++i) put_entry(out + i, static_cast<float>(static_cast<int8_t>(rows[i])) * factor);
  }
}

inline void widen_bf16(const uint16_t* from, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load_bf16(from + i));
  for (; i < count; ++i) out[i] = bf16_value(from[i]);
}

// out (32) = out * fade + sums
GOSSAMER_NOINLINE inline void add_faded(float* out, float fade, const float* sums) {
  for (int i = 0; i < PANEL; i += W) store(out + i, fma(load(out + i), set1(fade), load(sums + i)));
}

// --- products --------------------------------------------------------------------------------------------------------

// The products of `height` rows, `stride` entries apart, with a panel, into sums. `ahead`, unless null, is memory to fetch
// meanwhile: so many bytes per step, which without tiles are 64.
template <class Dot, bool TILED, class Entry>
GOSSAMER_INLINE void panel_products(const uint8_t* panel, const Entry* rows, int64_t stride, int64_t steps, int height,
                                    const uint8_t* ahead, int64_t ahead_bytes, float* sums, int64_t sums_stride) {
  const uint8_t* a = reinterpret_cast<const uint8_t*>(rows);
  if (TILED) return tile_products(panel, a, stride * sizeof(Entry), steps, height, ahead, ahead_bytes, sums, sums_stride);
  for (int pass = 0; pass < PASSES; ++pass)
    tile_of<Dot>(height, panel + pass * W * 4, a, stride * sizeof(Entry), steps, pass == 0 ? ahead : nullptr, sums + pass * W,
                 sums_stride);
}

// --- a task ----------------------------------------------------------------------------------------------------------

// The scratch of a task, divided.
template <class Entry>
struct AttentionScratch {
  int64_t dim, wide, rows, block;
  float most;           // see AttentionTask::cap
  Entry* q;             // (rows, dim)
  float* out;           // (rows, wide)
  uint8_t* keys;        // of a block, packed
  uint8_t* values;
  float* scores;        // (ATTENTION_HEIGHT, block)
  Entry* shares;        // (ATTENTION_HEIGHT, block): 2^(score - peak)
  int64_t *begin, *end; // (rows) the keys that a row sees
  float *peak, *total;  // (rows)
  Entry* plain;         // (block, dim): int8 keys or values
  int64_t first, last;  // the keys that any row sees

  explicit AttentionScratch(const AttentionTask& task)
      : dim(task.dim), wide((task.dim + 31) / 32 * 32), rows(task.rows * task.group), block(attention_keys(task.dim)), most(task.cap) {
    uint8_t* scratch = task.scratch;
    const auto take = [&](int64_t bytes) {
      uint8_t* p = scratch;
      scratch += bytes;
      return p;
    };
    q = reinterpret_cast<Entry*>(take(ATTENTION_ROWS * wide * 4));
    out = reinterpret_cast<float*>(take(ATTENTION_ROWS * wide * 4));
    keys = take(block * wide * 4);
    values = take(block * wide * 4);
    scores = reinterpret_cast<float*>(take(ATTENTION_HEIGHT * block * 4));
    shares = reinterpret_cast<Entry*>(take(ATTENTION_HEIGHT * block * 4));
    begin = reinterpret_cast<int64_t*>(take(ATTENTION_ROWS * 8));
    end = reinterpret_cast<int64_t*>(take(ATTENTION_ROWS * 8));
    peak = reinterpret_cast<float*>(take(ATTENTION_ROWS * 4));
    total = reinterpret_cast<float*>(take(ATTENTION_ROWS * 4));
    plain = reinterpret_cast<Entry*>(take(0));
    first = task.n;
    last = 0;
    for (int64_t i = 0; i < task.rows; ++i) {
      const int64_t token = task.tokens[i], position = task.position[token] - task.start;
      take_queries(task, static_cast<const uint8_t*>(task.q), token * task.q_stride + task.head * dim, q + i * task.group * dim);
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
  }

  // (count, dim) of the stored rows.
  const Entry* entries(const AttentionTask& task, const void* rows, int64_t count) const {
    if (task.type == Type::int8) {
      widen(static_cast<const uint8_t*>(rows), count, dim, 0, plain);
      return plain;
    }
    if constexpr (sizeof(Entry) == 4) {
      if (task.type == Type::bf16) {
        widen_bf16(static_cast<const uint16_t*>(rows), count * dim, plain);
        return plain;
      }
    }
    return static_cast<const Entry*>(rows);
  }

  // The queries of a token, which are of query_type.
  void take_queries(const AttentionTask& task, const uint8_t* all, int64_t first, Entry* to) const {
    const int64_t count = task.group * dim;
    if constexpr (sizeof(Entry) == 4) {
      if (task.type != Type::f32) return widen_bf16(reinterpret_cast<const uint16_t*>(all) + first, count, to);
    }
    std::memcpy(to, all + first * sizeof(Entry), count * sizeof(Entry));
  }

  // Whether rows [r0, r1) see any of the keys [key, key + count), and whether some of these are hidden from one of them.
  bool sees(int64_t r0, int64_t r1, int64_t key, int64_t count, bool& masked) const {
    bool seen = false;
    for (int64_t r = r0; r < r1; ++r) {
      seen |= begin[r] < key + count && end[r] > key && begin[r] < end[r];
      masked |= begin[r] > key || end[r] < key + count;
    }
    return seen;
  }

  // Of `height` rows, `stride` apart.
  void cap_scores(int height, int64_t stride, int64_t padded) const {
    if (most > 0)
      for (int r = 0; r < height; ++r) cap(scores + r * stride, padded, most);
  }

  // The softmax of a row's scores (padded), relative to what it has seen so far. Returns by what that fades.
  GOSSAMER_INLINE float soften(int64_t row, float* s, Entry* share, int64_t key, int64_t padded, bool masked) {
    const F nothing = set1(-__builtin_inff());
    F highest = nothing;
    if (masked) {
      const F low = set1(static_cast<float>(begin[row] - key)), high = set1(static_cast<float>(end[row] - key));
      for (int64_t i = 0; i < padded; i += W) {
        const F place = add(iota(), set1(static_cast<float>(i)));
        const F v = select_greater(low, place, nothing, select_greater(high, place, load(s + i), nothing));
        store(s + i, v);
        highest = max(v, highest);
      }
    } else {
      for (int64_t i = 0; i < padded; i += W) highest = max(load(s + i), highest);
    }
    const float before = peak[row], found = reduce_max(highest), now = found > before ? found : before;
    if (!(now > -__builtin_inff())) {  // nothing seen yet
      for (int64_t i = 0; i < padded; i += W) store_entries(share + i, zero());
      return 0;
    }
    constexpr int degree = sizeof(Entry) == 2 ? 4 : 6;
    F sum = zero();
    for (int64_t i = 0; i < padded; i += W) {
      const F v = exp2<degree>(sub(load(s + i), set1(now)));
      sum = add(sum, v);
      store_entries(share + i, v);
    }
    const float fade = before > -__builtin_inff() ? scalar_exp2(before - now) : 0;
    peak[row] = now;
    total[row] = total[row] * fade + reduce_add(sum);
    return fade;
  }

  // Products of `of` (height, steps) with a panel of values, added to columns [d, d + 32) of the output of rows
  // [r0, r0 + height), which is multiplied with `fade` (height) first, unless that is null.
  template <class Dot, bool TILED = false>
  void add_values(int64_t r0, int height, const float* fade, int64_t d, const uint8_t* panel, const Entry* of, int64_t steps,
                  const uint8_t* ahead, int64_t ahead_bytes = 64) const {
    alignas(64) float sums[(TILED ? MOST_TILED : TILE) * PANEL];
    panel_products<Dot, TILED>(panel, of, block, steps, height, ahead, ahead_bytes, sums, PANEL);
    for (int r = 0; r < height; ++r) add_faded(out + (r0 + r) * wide + d, fade ? fade[r] : 1, sums + r * PANEL);
  }

  void finish(const AttentionTask& task) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = r / task.group, head = r % task.group;
      std::memcpy(task.out + token * task.out_stride + head * dim, out + r * wide, dim * sizeof(float));
      float* state = task.state + token * task.state_stride + 2 * head;
      state[0] = peak[r];
      state[1] = total[r];
    }
  }
};

// TILED: in tiles (tiles.h), for entries in bf16 and a multiple of 32 dimensions.
template <class Dot, class Entry, bool TILED>
inline void attend_rows(const AttentionTask& task) {
  AttentionScratch<Entry> w(task);
  const int64_t steps = w.dim / Dot::step, row_bytes = w.dim * sizeof(Entry), stored = kv_bytes(task.type, w.dim);
  // A packed block has 128 bytes per step. Without tiles 64 are fetched at a time, which may be half of what is stored.
  const bool narrow = row_bytes >= 2 * stored;
  const int64_t parts = TILED || narrow ? 1 : 2, line = TILED && !narrow ? STEP_BYTES : 64;
  const uint8_t *keys = static_cast<const uint8_t*>(task.keys), *values = static_cast<const uint8_t*>(task.values);
  constexpr int MOST = TILED ? MOST_TILED : TILE;
  const int64_t tiles = (w.rows + MOST - 1) / MOST;
  int shaped = 0;
  for (int64_t key = w.first / 32 * 32; key < w.last; key += w.block) {
    const int64_t count = w.last - key < w.block ? w.last - key : w.block, padded = (count + 31) / 32 * 32;
    const Entry* k = w.entries(task, keys + key * stored, count);
    for (int64_t p = 0; p < padded; p += PANEL)
      transpose_words(reinterpret_cast<const uint32_t*>(k + p * w.dim), row_bytes / 4, count - p < PANEL ? count - p : PANEL,
                      steps, reinterpret_cast<uint32_t*>(w.keys + p / PANEL * steps * STEP_BYTES));
    pack_values<Dot>(w.entries(task, values + key * stored, count), count, w.dim, w.values);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t r0 = w.rows * t / tiles, r1 = w.rows * (t + 1) / tiles;
      const int height = static_cast<int>(r1 - r0);
      bool masked = padded != count;
      if (!w.sees(r0, r1, key, count, masked)) continue;
      if (TILED && shaped != height) shape_tiles(height);
      shaped = height;
      // the first tiles fetch the next block meanwhile: a part each of its keys, and then of its values
      const int64_t next = (key + w.block + t * w.block / parts) * stored;
      const bool fetch = t < parts && key + w.block < w.last;
      const uint8_t *soon_keys = fetch ? keys + next : nullptr, *soon_values = fetch ? values + next : nullptr;
      for (int64_t p = 0; p < padded; p += PANEL)
        panel_products<Dot, TILED>(w.keys + p / PANEL * steps * STEP_BYTES, w.q + r0 * w.dim, w.dim, steps, height,
                                   soon_keys ? soon_keys + p / PANEL * steps * line : nullptr, line, w.scores + p, w.block);
      float fade[MOST];
      w.cap_scores(height, w.block, padded);
      for (int r = 0; r < height; ++r)
        fade[r] = w.soften(r0 + r, w.scores + r * w.block, w.shares + r * w.block, key, padded, masked);
      const int64_t value_steps = padded / Dot::step;
      for (int64_t d = 0; d < w.wide; d += PANEL) {
        const uint8_t* ahead = soon_values ? soon_values + d / PANEL * value_steps * line : nullptr;
        w.template add_values<Dot, TILED>(r0, height, fade, d, w.values + d / PANEL * value_steps * STEP_BYTES, w.shares,
                                          value_steps, ahead, line);
      }
    }
  }
  if (TILED && shaped) release_tiles();
  w.finish(task);
}

#if defined(__AVX512BF16__)
// The sums of the lanes of 16 vectors, in the order of the vectors.
GOSSAMER_INLINE F sums_of_lanes(F (&v)[16]) {
  // each round adds two vectors into one that keeps half of either, pairwise
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    v[i] = add(_mm512_unpacklo_ps(v[i], v[i + 8]), _mm512_unpackhi_ps(v[i], v[i + 8]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    v[i] = add(_mm512_unpacklo_ps(v[i], v[i + 4]), _mm512_unpackhi_ps(v[i], v[i + 4]));
  // lane 4 l + j of v[i] belongs to vector i + 4 j now; four l are still to be added up
  const F a = add(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
  const F b = add(_mm512_shuffle_f32x4(v[2], v[3], 0x88), _mm512_shuffle_f32x4(v[2], v[3], 0xdd));
  const F c = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, c);
}

// The products of a row of queries with 16 rows of keys, of which `there` exist; rows beyond the last are read from it.
// What stands `ahead` bytes further on is fetched meanwhile, if FETCH.
template <bool FETCH>
GOSSAMER_NOINLINE void score_few(const uint32_t* q, const uint32_t* keys, int64_t words, int64_t there, int64_t ahead, float* out) {
  F sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const uint32_t* row = keys + (i < there ? i : there - 1) * words;
    F each = zero();
    for (int64_t word = 0; word < words; word += 16) {
      each = Bf16Dot::dot(each, load_int(row + word), load_int(q + word));
      if (FETCH) __builtin_prefetch(reinterpret_cast<const uint8_t*>(row + word) + ahead);
    }
    sum[i] = each;
  }
  store(out, sums_of_lanes(sum));
}

// out (ROWS, 16 HALVES), `wide` between rows, = out * fade (ROWS) + shares (ROWS, `block`) times `count` rows of values:
// their entries from the d-th on, of rows of `dim` entries in `stored` bytes at v. What stands `ahead` bytes further on is
// fetched meanwhile. Keys are taken in pairs and interleaved, which leaves groups of four dimensions in turns.
template <int ROWS, int HALVES, bool CODED>
GOSSAMER_NOINLINE void add_values_few(const uint8_t* v, int64_t d, int64_t dim, int64_t stored, int64_t count, int64_t ahead,
                                      const uint16_t* shares, int64_t block, const float* fade, float* out, int64_t wide) {
  const auto load_values = [&](const uint8_t* row, int64_t at) GOSSAMER_LAMBDA {  // 32 of them
    const uint8_t* from = row + at * (CODED ? 1 : 2);
    __builtin_prefetch(from + ahead);
    if (!CODED) return load_int(from);
    const F scale = scale_of(row, dim);
    const F low = mul(load_int8(from), scale), high = mul(load_int8(from + 16), scale);
    return reinterpret_cast<I>(_mm512_cvtne2ps_pbh(high, low));
  };
  F sum[ROWS][HALVES];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int h = 0; h < HALVES; ++h) sum[r][h] = mul(load(out + r * wide + 16 * h), set1(fade[r]));
  const auto add_pair = [&](int64_t i, int64_t next) GOSSAMER_LAMBDA {
    I part[HALVES];
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; h += 2) {
      const I a = load_values(v + i * stored, d + 16 * h), b = load_values(v + next * stored, d + 16 * h);
      part[h] = _mm512_unpacklo_epi16(a, b);
      part[h + 1] = _mm512_unpackhi_epi16(a, b);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const I share = broadcast(shares + r * block + i);
#pragma GCC unroll 4
      for (int h = 0; h < HALVES; ++h) sum[r][h] = Bf16Dot::dot(sum[r][h], part[h], share);
    }
  };
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) add_pair(i, i + 1);
  if (i < count) add_pair(i, i);  // the second share is 0
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int h = 0; h < HALVES; ++h) store(out + r * wide + 16 * h, sum[r][h]);
}

// For a few rows memory sets the pace, and packing a block before it is used would keep it waiting: keys and values are
// read once, in the order in which they stand. D is a multiple of 32.
template <int ROWS, bool CODED>
inline void attend_few(const AttentionTask& task) {
  AttentionScratch<uint16_t> w(task);
  const int64_t words = w.dim / 2, block = 8 / ROWS * w.block, stored = kv_bytes(task.type, w.dim);
  const uint32_t* q = reinterpret_cast<const uint32_t*>(w.q);
  const auto distance = [](const void* next, const void* from) {
    return next ? static_cast<const uint8_t*>(next) - static_cast<const uint8_t*>(from) : 0;
  };
  const int64_t to_keys = distance(task.next_keys, task.keys), to_values = distance(task.next_values, task.values);
  for (int64_t key = w.first / 32 * 32; key < w.last; key += block) {
    const int64_t count = w.last - key < block ? w.last - key : block, padded = (count + 15) / 16 * 16;
    bool masked = padded != count;
    if (!w.sees(0, ROWS, key, count, masked)) continue;
    const uint8_t* next_rows = static_cast<const uint8_t*>(task.keys) + key * stored;
    for (int64_t p = 0; p < padded; p += 16, next_rows += 16 * stored) {
      const uint32_t* k = reinterpret_cast<const uint32_t*>(CODED ? reinterpret_cast<const uint8_t*>(w.plain) : next_rows);
      if (CODED) widen(next_rows, p + 16 <= count ? 16 : count - p, w.dim, to_keys, w.plain);
      const int64_t there = count - p;
      for (int r = 0; r < ROWS; ++r) {
        const auto score = r == 0 && !CODED ? score_few<true> : score_few<false>;
        score(q + r * words, k, words, there, to_keys, w.scores + r * block + p);
      }
    }
    float fade[ROWS];
    w.cap_scores(ROWS, block, padded);
    for (int r = 0; r < ROWS; ++r) fade[r] = w.soften(r, w.scores + r * block, w.shares + r * block, key, padded, masked);
    const uint8_t* v = static_cast<const uint8_t*>(task.values) + key * stored;
    const auto add_values = [&](auto function, int64_t d) {
      function(v, d, w.dim, stored, count, to_values, w.shares, block, fade, w.out + d, w.wide);
    };
    int64_t d = 0;
    for (; d + 64 <= w.dim; d += 64) add_values(add_values_few<ROWS, 4, CODED>, d);
    if (d < w.dim) add_values(add_values_few<ROWS, 2, CODED>, d);
  }
  // interleaving has left groups of four dimensions in turns
  for (int64_t r = 0; r < ROWS; ++r)
    for (int64_t d = 0; d < w.dim; d += PANEL) {
      float mixed[PANEL], *out = w.out + r * w.wide + d;
      std::memcpy(mixed, out, sizeof mixed);
      for (int g = 0; g < 4; ++g) {
        std::memcpy(out + 8 * g, mixed + 4 * g, 16);
        std::memcpy(out + 8 * g + 4, mixed + 16 + 4 * g, 16);
      }
    }
  w.finish(task);
}

// Whether the task has few rows, and so is done.
template <bool CODED>
inline bool attend_if_few(const AttentionTask& task) {
  if (task.dim % 32) return false;
  switch (task.rows * task.group) {
    case 1: attend_few<1, CODED>(task); return true;
    case 2: attend_few<2, CODED>(task); return true;
    case 3: attend_few<3, CODED>(task); return true;
    case 4: attend_few<4, CODED>(task); return true;
  }
  return false;
}
#endif

inline void attend(const AttentionTask& task) {
  // without instructions for bf16, a block is converted once to be multiplied in fp32
#if defined(__AVX512BF16__)
  if (!task.invariant && (task.type == Type::int8 ? attend_if_few<true>(task) : task.type == Type::bf16 && attend_if_few<false>(task)))
    return;
  if (task.type != Type::f32) {
    if constexpr (HAS_TILES)
      if (task.dim % PANEL == 0) return attend_rows<Bf16Dot, uint16_t, true>(task);
    return attend_rows<Bf16Dot, uint16_t, false>(task);
  }
#endif
  attend_rows<FloatDot, float, false>(task);
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

inline void join(float* out, float* state, const float* other, const float* other_state, int64_t dim) {
  if (!(other_state[1] > 0)) return;
  const float peak = other_state[0] > state[0] ? other_state[0] : state[0];
  const float fade = state[1] > 0 ? scalar_exp2(state[0] - peak) : 0.0f, gain = scalar_exp2(other_state[0] - peak);
  scale_row(out, fade, nullptr, dim, out, false);
  scale_row(other, gain, nullptr, dim, out, true);
  state[0] = peak;
  state[1] = state[1] * fade + other_state[1] * gain;
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
  for (i = rotated; i + W <= dim; i += W) write(i, load(x + i));
  for (; i < dim; ++i) write_one(i, x[i]);
}

}  // namespace GOSSAMER_NS
