// Weights in quantized blocks, multiplied as they are stored.
//
// Rows are int8 in blocks of 32, with a scale each. A product is a sum over sub-blocks: integers, exact, that are scaled in
// fp32 once per sub-block,
//   y = sum_j s_j (d_j sum_k q_k a_k - m_j sum_k a_k),
// for activations s a and weights d q - m. It is the same for every number of rows and for both ways to read a strip: a
// few rows take its codes from the packed words; for many these are written out as bytes first, once for all rows.
#include "block_codes.h"
#include "linear.h"
#include "formats/blocks.h"

namespace GOSSAMER_NS {

using namespace gossamer;

// How far ahead of what is read of a packed strip memory is asked for, in bytes. A processor's own prefetching loses its
// way here: a block's words are not read in the order of their addresses, and where a strip begins its scales lie apart.
// Measured on Zen 3 alone.
constexpr int64_t FETCH_AHEAD = 2048;

// Asks for sub-block H's part of what lies ahead: all of a block at once would be more than a core can wait for.
template <class T, int H>
GOSSAMER_INLINE void fetch_ahead(const uint8_t* lines, int group) {
  constexpr int BYTES = Reading<T>::LINE_BYTES / T::GROUPS, FETCHES = (BYTES + 63) / 64, PARTS = T::SUBS / T::GROUPS;
  const uint8_t* ahead = lines + FETCH_AHEAD + group * BYTES;
  repeat<FETCHES>([&](auto i) GOSSAMER_LAMBDA {
    constexpr int AT = decltype(i)::value;
    if constexpr (AT * PARTS / FETCHES == H) __builtin_prefetch(ahead + 64 * AT);
  });
}

#if defined(__AVX512BW__) && !defined(__AVX512VNNI__)
#define GOSSAMER_PAIRS _mm512_maddubs_epi16
#define GOSSAMER_ADD_PAIRS _mm512_add_epi16
#define GOSSAMER_SHIFT_PAIRS _mm512_slli_epi16
#define GOSSAMER_JOIN_PAIRS(v) _mm512_madd_epi16(v, _mm512_set1_epi16(1))
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define GOSSAMER_PAIRS _mm256_maddubs_epi16
#define GOSSAMER_ADD_PAIRS _mm256_add_epi16
#define GOSSAMER_SHIFT_PAIRS _mm256_slli_epi16
#define GOSSAMER_JOIN_PAIRS(v) _mm256_madd_epi16(v, _mm256_set1_epi16(1))
#endif

// Some prepared rows.
struct BlockRows {
  const int8_t* codes;      // `stride` bytes from row to row
  const RowBlock* blocks;   // `count` from row to row
  int64_t stride, count;
};

// each(r, what is at `block` of row r): a pointer goes from row to row, as there are too few registers for one to each.
template <int ROWS, class Each>
GOSSAMER_INLINE void for_rows(const RowBlock* block, const BlockRows& rows, const Each& each) {
  repeat<ROWS>([&](auto r) GOSSAMER_LAMBDA {
    if constexpr (ROWS > 1) block = read_again(block);
    each(r, *block);
    block += rows.count;
  });
}

// sum[s][r] = the products of a sub-block's codes in strip s, `strip` bytes after the one before, with those of row r, at
// `a`. Where codes are stored with an offset, or get one here because the instruction wants it, the sums are those without
// it.
template <class T, int H, int STRIPS, int ROWS>
GOSSAMER_INLINE void sub_block(const uint8_t* lines, int64_t strip, int group, const BlockRows& rows, const int8_t* a,
                               const RowBlock* block, I (&sum)[STRIPS][ROWS]) {
  // each(strip, row, codes, activations, whether they are the first ones), in the order of the weights
  const auto products = [&](const auto& each) GOSSAMER_LAMBDA {
    repeat<T::SUB / 4>([&](auto step) GOSSAMER_LAMBDA {
      constexpr int S = decltype(step)::value;
      I codes[STRIPS];
      repeat<STRIPS>([&](auto s) GOSSAMER_LAMBDA {
        const uint8_t* from = lines + decltype(s)::value * strip;
        codes[decltype(s)::value] = T::template codes<H, S>(ROWS > 1 ? read_again(from) : from, group);
      });
      repeat<ROWS>([&](auto r) GOSSAMER_LAMBDA {
        const I activations = broadcast(a + decltype(r)::value * rows.stride + 4 * S);
        repeat<STRIPS>([&](auto s) GOSSAMER_LAMBDA {
          each(s, r, codes[decltype(s)::value], activations, Count<S == 0>{});
        });
      });
    });
  };
#if defined(GOSSAMER_PAIRS)
  if constexpr (!T::SIGNED) {
    // Products of two neighbours are added up in 16 bit, all that a lane gets of a sub-block. These sums may wrap around
    // on the way: with an offset, the stored one or one that is taken back in the end, the last of them fits.
    constexpr int PRODUCTS = T::SUB / 2;
    constexpr int OFFSET = T::OFFSET > 0 ? T::OFFSET : T::MOST * 127 * PRODUCTS <= 32767 ? 0 : 4;
    static_assert((OFFSET ? (T::MOST < 2 << OFFSET ? 1 << OFFSET : T::MOST + 1 - (1 << OFFSET)) : T::MOST) * 127 * PRODUCTS <= 32767);
    static_assert(2 * T::MOST * 127 <= 32767);  // what the instruction adds up itself saturates
    I pairs[STRIPS][ROWS];
    if constexpr (OFFSET > 0)
      for_rows<ROWS>(block, rows, [&](auto r, const RowBlock& at) GOSSAMER_LAMBDA {
        const I start = GOSSAMER_SHIFT_PAIRS(broadcast(T::SUB == 32 ? &at.minus_pairs : at.minus_half_pairs + H % 2), OFFSET);
        repeat<STRIPS>([&](auto s) GOSSAMER_LAMBDA { pairs[decltype(s)::value][decltype(r)::value] = start; });
      });
    products([&](auto s, auto r, I codes, I activations, auto first) GOSSAMER_LAMBDA {
      I& to = pairs[decltype(s)::value][decltype(r)::value];
      const I more = GOSSAMER_PAIRS(codes, activations);
      to = OFFSET == 0 && decltype(first)::value ? more : GOSSAMER_ADD_PAIRS(to, more);
      keep_order(to);
    });
    for_rows<ROWS>(block, rows, [&](auto r, const RowBlock& at) GOSSAMER_LAMBDA {
      repeat<STRIPS>([&](auto s) GOSSAMER_LAMBDA {
        I& to = sum[decltype(s)::value][decltype(r)::value];
        to = GOSSAMER_JOIN_PAIRS(pairs[decltype(s)::value][decltype(r)::value]);
        if constexpr (OFFSET > 0 && T::OFFSET < 0) to = add_int(to, shift_right<-OFFSET>(broadcast(&at.sum)));
        keep_order(to);
      });
    });
    return;
  }
#endif
#if defined(__AVX512VNNI__)
  constexpr int OFFSET = T::SIGNED ? 7 : T::OFFSET;
#else
  constexpr int OFFSET = T::SIGNED ? 0 : T::OFFSET;
#endif
  for_rows<ROWS>(block, rows, [&](auto r, const RowBlock& at) GOSSAMER_LAMBDA {
    I start = zero_int();
    if constexpr (OFFSET > 0)
      start = sub_int(start, shift_right<-OFFSET>(broadcast(T::SUB == 32 ? &at.sum : at.half_sum + H % 2)));
    repeat<STRIPS>([&](auto s) GOSSAMER_LAMBDA { sum[decltype(s)::value][decltype(r)::value] = start; });
  });
  products([&](auto s, auto r, I codes, I activations, auto) GOSSAMER_LAMBDA {
    I& to = sum[decltype(s)::value][decltype(r)::value];
    to = dot_bytes<T::SIGNED>(to, codes, activations);
    keep_order(to);
  });
}

// The strips of an unpacked weight that are read side by side: with 16 registers and without VNNI most time goes into
// loading activations, which they share.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int SIDE_BY_SIDE = 2;
#else
constexpr int SIDE_BY_SIDE = 1;
#endif

// The products of ROWS rows with a strip, or those side by side, into sums + r * PANEL. `scratch`: the scales of a block.
// An unpacked strip lies in a cache: memory is asked for two lines of what stands at `ahead` per block meanwhile.
template <class T, int ROWS>
GOSSAMER_NOINLINE void strip_products(const uint8_t* lines, const uint8_t* halves, int64_t blocks, BlockRows rows,
                                      float* scratch, const uint8_t* ahead, float* sums) {
  constexpr int SCALES = T::OFFSET < 0 ? 2 : 1, PER_GROUP = T::SUBS / T::GROUPS;
  constexpr int STRIPS = Reading<T>::UNPACKED ? SIDE_BY_SIDE : 1;
  // Without VNNI a full tile takes all registers for a sub-block: the sums of its rows wait in memory.
#if defined(__AVX512VNNI__)
  constexpr bool WAITING = false;
#else
  constexpr bool WAITING = ROWS == TILE;
#endif
  const int64_t line_bytes = blocks * Reading<T>::LINE_BYTES, scale_bytes = blocks * Reading<T>::SCALE_BYTES;
  F y[STRIPS][ROWS];
  repeat<STRIPS * ROWS>([&](auto i) GOSSAMER_LAMBDA {
    constexpr int S = decltype(i)::value / ROWS, R = decltype(i)::value % ROWS;
    y[S][R] = zero();
    if constexpr (WAITING) store(sums + R * PANEL + S * W, y[S][R]);
  });
  const int8_t* a = rows.codes;
  const RowBlock* block = rows.blocks;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* scale;
    if constexpr (Reading<T>::UNPACKED) {
      scale = reinterpret_cast<const float*>(halves);
      __builtin_prefetch(ahead + 128 * b, 0, 2);
      __builtin_prefetch(ahead + 128 * b + 64, 0, 2);
    } else {
      __builtin_prefetch(halves + line_bytes + scale_bytes);  // where those of the next strip are
      T::scales(lines, halves, scratch);
      scale = scratch;
    }
    for (int group = 0; group < T::GROUPS; ++group) {
      repeat<PER_GROUP>([&](auto h) GOSSAMER_LAMBDA {
        constexpr int H = decltype(h)::value;
        if constexpr (!Reading<T>::UNPACKED) fetch_ahead<T, H>(lines, group);
        I sum[STRIPS][ROWS];
        sub_block<T, H>(read_again(lines), line_bytes, group, rows, a + H * T::SUB, block + H * T::SUB / 32, sum);
        for_rows<ROWS>(block + H * T::SUB / 32, rows, [&](auto r, const RowBlock& at) GOSSAMER_LAMBDA {
          repeat<STRIPS>([&](auto s) GOSSAMER_LAMBDA {
            constexpr int S = decltype(s)::value, R = decltype(r)::value;
            const float* scales = scale + S * (scale_bytes / 4) + H * SCALES * W;
            F& to = y[S][R];
            if constexpr (WAITING) to = load(read_again(sums) + R * PANEL + S * W);
            to = fma(to_float(sum[S][R]), mul(load(scales), set1(at.scale)), to);
            if constexpr (T::OFFSET < 0) {
              const float* total = T::SUB == 32 ? &at.scaled_sum : at.scaled_half_sum + H % 2;
              to = fma(load(scales + W), set1(*total), to);
            }
            if constexpr (WAITING) store(sums + R * PANEL + S * W, to);
          });
        });
      });
      a += PER_GROUP * T::SUB;
      block += PER_GROUP * T::SUB / 32;
      scale += PER_GROUP * SCALES * W;
    }
    lines += Reading<T>::LINE_BYTES;
    halves += Reading<T>::SCALE_BYTES;
  }
  if constexpr (!WAITING)
    repeat<STRIPS * ROWS>([&](auto i) GOSSAMER_LAMBDA {
      constexpr int S = decltype(i)::value / ROWS, R = decltype(i)::value % ROWS;
      store(sums + R * PANEL + S * W, y[S][R]);
    });
}

// Writes a strip out: its codes as bytes, in the order of the weights, and the scales of all sub-blocks.
template <class T>
GOSSAMER_NOINLINE void unpack_strip(const uint8_t* lines, const uint8_t* halves, int64_t blocks, uint8_t* codes, float* scales) {
  constexpr int SCALES = T::OFFSET < 0 ? 2 : 1, PER_GROUP = T::SUBS / T::GROUPS;
  const int64_t strip = blocks * (Reading<T>::LINE_BYTES + Reading<T>::SCALE_BYTES);
  for (int64_t b = 0; b < blocks; ++b) {
    __builtin_prefetch(halves + strip);
    T::scales(lines, halves, scales);
    for (int group = 0; group < T::GROUPS; ++group) {
      repeat<PER_GROUP>([&](auto h) GOSSAMER_LAMBDA {
        fetch_ahead<T, decltype(h)::value>(lines, group);
        repeat<T::SUB / 4>([&](auto step) GOSSAMER_LAMBDA {
          constexpr int H = decltype(h)::value, S = decltype(step)::value;
          store_int(codes + (H * T::SUB / 4 + S) * LINE, T::template codes<H, S>(lines, group));
        });
      });
      codes += PER_GROUP * T::SUB * W;
    }
    scales += T::SUBS * SCALES * W;
    lines += Reading<T>::LINE_BYTES;
    halves += Reading<T>::SCALE_BYTES;
  }
}

constexpr int64_t PACKED_ROWS = W == 8 ? 2 : 4;  // at a time: as many as 16 registers have room for, or 32

// The kernels of a type.
struct StripKernels {
  using Products = void (*)(const uint8_t* lines, const uint8_t* halves, int64_t blocks, BlockRows rows, float* scratch,
                            const uint8_t* ahead, float* sums);
  Products packed[3], unpacked[4];  // of 1, 2, 4 and 8 rows
  void (*unpack)(const uint8_t* lines, const uint8_t* halves, int64_t blocks, uint8_t* codes, float* scales);
  int sub_block_scales;             // per 32 weights: with minima
};

template <class T>
constexpr StripKernels strip_kernels() {
  using U = Unpacked<T>;
  StripKernels all{{strip_products<T, 1>, strip_products<T, 2>, nullptr},
                   {strip_products<U, 1>, strip_products<U, 2>, strip_products<U, 4>, nullptr},
                   unpack_strip<T>,
                   32 / T::SUB * (T::OFFSET < 0 ? 2 : 1)};
  if constexpr (PACKED_ROWS == 4) all.packed[2] = strip_products<T, 4>;
  if constexpr (TILE == 8) all.unpacked[3] = strip_products<U, 8>;
  return all;
}

inline const StripKernels& kernels_of_type(BlockType type) {
  static constexpr StripKernels Q40 = strip_kernels<Q4_0>(), Q41 = strip_kernels<Q4_1>(), Q50 = strip_kernels<Q5_0>(),
                                Q51 = strip_kernels<Q5_1>(), Q80 = strip_kernels<Q8_0>(), Q2K = strip_kernels<Q2_K>(),
                                Q3K = strip_kernels<Q3_K>(), Q4K = strip_kernels<Q4_K>(), Q5K = strip_kernels<Q5_K>(),
                                Q6K = strip_kernels<Q6_K>(), IQ4NL = strip_kernels<IQ4_NL>(), IQ4XS = strip_kernels<IQ4_XS>(),
                                FP4 = strip_kernels<MXFP4>(), G4F16 = strip_kernels<Group4<BlockType::group4_fp16>>(),
                                G4BF16 = strip_kernels<Group4<BlockType::group4_bf16>>();
  switch (type) {
    case BlockType::q4_0: return Q40;
    case BlockType::q4_1: return Q41;
    case BlockType::q5_0: return Q50;
    case BlockType::q5_1: return Q51;
    case BlockType::q8_0: return Q80;
    case BlockType::q2_k: return Q2K;
    case BlockType::q3_k: return Q3K;
    case BlockType::q4_k: return Q4K;
    case BlockType::q5_k: return Q5K;
    case BlockType::q6_k: return Q6K;
    case BlockType::iq4_nl: return IQ4NL;
    case BlockType::iq4_xs: return IQ4XS;
    case BlockType::mxfp4: return FP4;
    case BlockType::group4_fp16: return G4F16;
    case BlockType::group4_bf16: return G4BF16;
  }
  __builtin_unreachable();
}

// What finish() has to know: nothing is left to scale.
struct Sums {
  struct Dot {
    using Number = float;
  };
  static constexpr bool CODED = false;
};

// A strip of a packed weight, W outputs from `output` on.
struct Strip {
  BlockLayout layout;
  const StripKernels* kernels;
  int64_t blocks;          // of an output
  uint8_t *lines, *halves;

  Strip(const PackedWeight& w, int64_t output) {
    const BlockType type = w.types[output / 16];
    layout = layout_of(type);
    kernels = &kernels_of_type(type);
    blocks = w.k / layout.weights;
    const int64_t each = blocks * (layout.words * 4 + layout.halves * 2) * W;
    lines = w.panel(output / PANEL) + (output % PANEL < 16 ? 0 : w.second_group(output / PANEL)) + output % 16 / W * each;
    halves = lines + blocks * layout.words * LINE;
  }
};

// `source`: rows of the type that their outputs have in the weight.
void pack_blocks(PackedWeight& w, const void* source, Type, int64_t rows, int64_t first, int64_t part, int64_t parts) {
  const uint8_t* row = static_cast<const uint8_t*>(source);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = packed_row(first + r, part, parts);
    const Strip strip(w, n / W * W);
    const BlockLayout& of = strip.layout;
    const bool five = w.types[n / 16] == BlockType::q5_0 || w.types[n / 16] == BlockType::q5_1;
    uint8_t *line = strip.lines + n % W * 4, *half = strip.halves + n % W * 2;
    for (int64_t b = 0; b < strip.blocks; ++b, row += of.bytes) {
      for (int i = 0; i < of.words; ++i, line += LINE) {
        uint32_t word;
        std::memcpy(&word, row + of.first_word + 4 * i, 4);
        if (five && i == 0) word = spread_high_bits(word);
        std::memcpy(line, &word, 4);
      }
      for (int i = 0; i < of.halves; ++i, half += 2 * W) {
        uint16_t bits = row[of.half[i]];
        if (of.bytes != 17) std::memcpy(&bits, row + of.half[i], 2);
        std::memcpy(half, &bits, 2);
      }
    }
  }
}

// The bytes of a block that pack_blocks() was given for an output.
static void restore(const PackedWeight& w, int64_t n, int64_t b, uint8_t* block) {
  const Strip strip(w, n / W * W);
  const BlockLayout& of = strip.layout;
  const bool five = w.types[n / 16] == BlockType::q5_0 || w.types[n / 16] == BlockType::q5_1;
  for (int i = 0; i < of.words; ++i) {
    uint32_t word;
    std::memcpy(&word, strip.lines + (b * of.words + i) * LINE + n % W * 4, 4);
    if (five && i == 0) word = gather_high_bits(word);
    std::memcpy(block + of.first_word + 4 * i, &word, 4);
  }
  for (int i = 0; i < of.halves; ++i)
    std::memcpy(block + of.half[i], strip.halves + ((b * of.halves + i) * W + n % W) * 2, of.bytes == 17 ? 1 : 2);
}

void look_up_blocks(const PackedWeight& w, int64_t n, float factor, float* out) {
  const BlockLayout of = layout_of(w.types[n / 16]);
  uint8_t block[256];
  for (int64_t b = 0; b < w.k / of.weights; ++b, out += of.weights) {
    restore(w, n, b, block);
    dequantize(w.types[n / 16], block, out);
    if (factor != 1)
      for (int i = 0; i < of.weights; ++i) out[i] *= factor;
  }
}

void multiply_blocks(const LinearCall& c) {
  constexpr int STRIPS = PANEL / W;
  const PackedWeight& w = *c.weight;
  const Prepared& x = *c.x;
  const int64_t rows = c.last_row - c.first_row;
  const bool unpacked = rows > w.few_rows;
  alignas(64) float sums[TILE * PANEL];
  for (int64_t panel = c.first_panel; panel < c.last_panel; ++panel) {
    const StripKernels* kernels[STRIPS];
    const uint8_t *lines[STRIPS], *halves[STRIPS];
    int64_t blocks[STRIPS];
    float* scales = c.scratch;
    for (int s = 0; s < STRIPS; ++s) {
      const Strip strip(w, panel * PANEL + s * W);
      kernels[s] = strip.kernels;
      lines[s] = strip.lines;
      halves[s] = strip.halves;
      blocks[s] = strip.blocks;
      if (!unpacked) continue;
      uint8_t* codes = c.entries + s * w.k * W;
      strip.kernels->unpack(lines[s], halves[s], blocks[s], codes, scales);
      lines[s] = codes;
      halves[s] = reinterpret_cast<const uint8_t*>(scales);
      blocks[s] = w.k / 32;
      scales += blocks[s] * strip.kernels->sub_block_scales * W;
    }
    // memory brings the next panel while rows are multiplied with this one
    const bool last = panel + 1 == c.last_panel;
    const uint8_t *next = w.panel(panel + !last), *end = last ? next : w.panel(panel + 2);
    for (int64_t m = c.first_row; m < c.last_row;) {
      int size = !unpacked && PACKED_ROWS == 2 ? 1 : unpacked && TILE == 8 ? 3 : 2;
      while (m + (1 << size) > c.last_row) --size;
      const BlockRows some{static_cast<const int8_t*>(x.data) + m * x.stride, x.blocks + m * (x.k / 32), x.stride, x.k / 32};
      for (int s = 0; s < STRIPS; s += unpacked ? SIDE_BY_SIDE : 1) {
        const auto products = unpacked ? kernels[s]->unpacked[size] : kernels[s]->packed[size];
        products(lines[s], halves[s], blocks[s], some, c.scratch, next < end ? next : lines[s], sums + s * W);
        if (next < end) next += 128 * blocks[s];
      }
      finish<Sums>(c, panel, m, m + (1 << size), sums);
      m += 1 << size;
    }
  }
}

void look_up_rows(const PackedWeight& w, int64_t n, float factor, float* out) {
  const BlockLayout of = layout_of(w.types[0]);
  const uint8_t* block = w.data + n * w.stride;
  for (int64_t b = 0; b < w.k / of.weights; ++b, out += of.weights, block += of.bytes) {
    dequantize(w.types[0], block, out);
    if (factor != 1)
      for (int i = 0; i < of.weights; ++i) out[i] *= factor;
  }
}

}  // namespace GOSSAMER_NS
