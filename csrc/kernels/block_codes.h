// How the codes and scales of each type of block are read from a packed strip.
//
// A strip holds the blocks of W outputs, one lane each, with what they have in common: for every block its words, a line
// of W words each, and apart from these, so that lines stay aligned, its scales of 16 bit, W of each. No bit of a word is
// moved but in Q5_0 and Q5_1: a line is what the instructions take, four neighbouring weights of each output.
//
// A type is a struct with
//   TYPE          see block_types.h
//   SUB           weights with a scale of their own, 16 or 32: a sub-block; there are SUBS in a block
//   GROUPS        into how many parts of the same shape a block falls; loops walk these
//   MOST          the largest code
//   SIGNED        codes are signed bytes, of any size; others are not negative
//   OFFSET        value = scale (code - 2^OFFSET); below 0: value = scale code + minimum
//   codes<H, S>   the codes of step S, four of each output, of sub-block H of a group
//   scales        of all sub-blocks of a block, W of each, each followed by its W minima if there are any
#pragma once

#include "block_types.h"
#include "simd.h"

namespace GOSSAMER_NS {

using gossamer::BlockType;

constexpr int LINE = 4 * W;  // bytes of a word of every output

GOSSAMER_INLINE I line(const uint8_t* lines, int index) { return load_int(lines + index * LINE); }
GOSSAMER_INLINE I mask_bytes(I v, uint32_t byte) { return and_int(v, set1_int(static_cast<int32_t>(byte * 0x01010101u))); }
GOSSAMER_INLINE const uint16_t* half(const uint8_t* halves, int index) {
  return reinterpret_cast<const uint16_t*>(halves) + index * W;
}
template <int BYTE>
GOSSAMER_INLINE F unsigned_byte(I v) {
  return to_float(and_int(shift_right<8 * BYTE>(v), set1_int(255)));
}
template <int BYTE>
GOSSAMER_INLINE F signed_byte(I v) {
  return to_float(shift_right_signed<24>(shift_right<8 * BYTE - 24>(v)));
}

// Two codes to a byte: codes 0 ... 15 in the low halves of four lines, 16 ... 31 in the high halves.
template <int S>
GOSSAMER_INLINE I halved(const uint8_t* lines) {
  return mask_bytes(shift_right<S < 4 ? 0 : 4>(line(lines, S % 4)), 15);
}
// The fifth bits that step S finds in a line of spread_high_bits().
template <int S>
GOSSAMER_INLINE I fifth_bits(I spread) {
  return mask_bytes(shift_right<S - 4>(spread), 16);
}

template <BlockType OF>
struct Nibbles {
  static constexpr BlockType TYPE = OF;
  static constexpr int SUB = 32, SUBS = 1, GROUPS = 1, MOST = 15;
  static constexpr bool SIGNED = false;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int) {
    return halved<S>(lines);
  }
};
struct Q4_0 : Nibbles<BlockType::q4_0> {
  static constexpr int OFFSET = 3;
  static GOSSAMER_INLINE void scales(const uint8_t*, const uint8_t* halves, float* out) { store(out, load_fp16(half(halves, 0))); }
};
struct Q4_1 : Nibbles<BlockType::q4_1> {
  static constexpr int OFFSET = -1;
  static GOSSAMER_INLINE void scales(const uint8_t*, const uint8_t* halves, float* out) {
    store(out, load_fp16(half(halves, 0)));
    store(out + W, load_fp16(half(halves, 1)));
  }
};
template <BlockType OF>
struct Group4 : Nibbles<OF> {
  static constexpr int OFFSET = -1;
  static GOSSAMER_INLINE void scales(const uint8_t*, const uint8_t* halves, float* out) {
    const F scale = OF == BlockType::group4_fp16 ? load_fp16(half(halves, 0)) : load_bf16(half(halves, 0));
    store(out, scale);
    store(out + W, sub(zero(), mul(scale, to_float(load_uint16(half(halves, 1))))));
  }
};

template <BlockType OF>
struct FiveBits {
  static constexpr BlockType TYPE = OF;
  static constexpr int SUB = 32, SUBS = 1, GROUPS = 1, MOST = 31;
  static constexpr bool SIGNED = false;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int) {
    return halved<S>(lines + LINE) | fifth_bits<S>(line(lines, 0));
  }
};
struct Q5_0 : FiveBits<BlockType::q5_0> {
  static constexpr int OFFSET = 4;
  static GOSSAMER_INLINE void scales(const uint8_t* lines, const uint8_t* halves, float* out) { Q4_0::scales(lines, halves, out); }
};
struct Q5_1 : FiveBits<BlockType::q5_1> {
  static constexpr int OFFSET = -1;
  static GOSSAMER_INLINE void scales(const uint8_t* lines, const uint8_t* halves, float* out) { Q4_1::scales(lines, halves, out); }
};

struct Q8_0 {
  static constexpr BlockType TYPE = BlockType::q8_0;
  static constexpr int SUB = 32, SUBS = 1, GROUPS = 1, MOST = 255, OFFSET = 0;
  static constexpr bool SIGNED = true;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int) {
    return line(lines, S);
  }
  static GOSSAMER_INLINE void scales(const uint8_t* lines, const uint8_t* halves, float* out) { Q4_0::scales(lines, halves, out); }
};

struct IQ4_NL : Nibbles<BlockType::iq4_nl> {
  static constexpr int MOST = 255, OFFSET = 0;
  static constexpr bool SIGNED = true;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int) {
    return look_up_bytes(gossamer::IQ4_VALUES, halved<S>(lines));
  }
  static GOSSAMER_INLINE void scales(const uint8_t* lines, const uint8_t* halves, float* out) { Q4_0::scales(lines, halves, out); }
};

struct MXFP4 : Nibbles<BlockType::mxfp4> {
  static constexpr int MOST = 255, OFFSET = 0;
  static constexpr bool SIGNED = true;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int) {
    return look_up_bytes(gossamer::MXFP4_VALUES, halved<S>(lines));
  }
  // 2^(e - 128); denormal for 0 and 1
  static GOSSAMER_INLINE void scales(const uint8_t*, const uint8_t* halves, float* out) {
    const I e = load_uint16(half(halves, 0));
    const F normal = as_float(shift_right<-23>(sub_int(e, set1_int(1))));
    const F small = as_float(add_int(shift_right<-21>(e), set1_int(0x00200000)));
    store(out, select_greater(to_float(e), set1(1.5f), normal, small));
  }
};

// The scales and minima of Q4_K and Q5_K, of six bits, in three lines.
GOSSAMER_INLINE void six_bit_scales(const uint8_t* lines, const uint8_t* halves, float* out) {
  const F d = load_fp16(half(halves, 0)), dmin = sub(zero(), load_fp16(half(halves, 1)));
  const I a = line(lines, 0), b = line(lines, 1), c = line(lines, 2);
  const I scale[2] = {mask_bytes(a, 63), mask_bytes(c, 15) | mask_bytes(shift_right<2>(a), 48)};
  const I min[2] = {mask_bytes(b, 63), mask_bytes(shift_right<4>(c), 15) | mask_bytes(shift_right<2>(b), 48)};
  repeat<8>([&](auto j) GOSSAMER_LAMBDA {
    constexpr int J = decltype(j)::value;
    store(out + 2 * J * W, mul(d, unsigned_byte<J % 4>(scale[J / 4])));
    store(out + (2 * J + 1) * W, mul(dmin, unsigned_byte<J % 4>(min[J / 4])));
  });
}

struct Q4_K {
  static constexpr BlockType TYPE = BlockType::q4_k;
  static constexpr int SUB = 32, SUBS = 8, GROUPS = 4, MOST = 15, OFFSET = -1;
  static constexpr bool SIGNED = false;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int group) {
    return mask_bytes(shift_right<4 * H>(line(lines, 3 + 8 * group + S)), 15);
  }
  static GOSSAMER_INLINE void scales(const uint8_t* lines, const uint8_t* halves, float* out) {
    six_bit_scales(lines, halves, out);
  }
};

struct Q5_K {
  static constexpr BlockType TYPE = BlockType::q5_k;
  static constexpr int SUB = 32, SUBS = 8, GROUPS = 4, MOST = 31, OFFSET = -1;
  static constexpr bool SIGNED = false;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int group) {
    const I fifth = mask_bytes(shift_right(line(lines, 3 + S), 2 * group + H), 1);
    return mask_bytes(shift_right<4 * H>(line(lines, 11 + 8 * group + S)), 15) | shift_right<-4>(fifth);
  }
  static GOSSAMER_INLINE void scales(const uint8_t* lines, const uint8_t* halves, float* out) {
    six_bit_scales(lines, halves, out);
  }
};

// In the types below a group is 128 weights: four runs of 32, two sub-blocks each, which share lines.
struct Q2_K {
  static constexpr BlockType TYPE = BlockType::q2_k;
  static constexpr int SUB = 16, SUBS = 16, GROUPS = 2, MOST = 3, OFFSET = -1;
  static constexpr bool SIGNED = false;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int group) {
    return mask_bytes(shift_right<H / 2 * 2>(line(lines, 4 + 8 * group + H % 2 * 4 + S)), 3);
  }
  static GOSSAMER_INLINE void scales(const uint8_t* lines, const uint8_t* halves, float* out) {
    const F d = load_fp16(half(halves, 0)), dmin = sub(zero(), load_fp16(half(halves, 1)));
    repeat<16>([&](auto j) GOSSAMER_LAMBDA {
      constexpr int J = decltype(j)::value;
      const I packed = line(lines, J / 4);
      store(out + 2 * J * W, mul(d, unsigned_byte<J % 4>(mask_bytes(packed, 15))));
      store(out + (2 * J + 1) * W, mul(dmin, unsigned_byte<J % 4>(mask_bytes(shift_right<4>(packed), 15))));
    });
  }
};

struct Q3_K {
  static constexpr BlockType TYPE = BlockType::q3_k;
  static constexpr int SUB = 16, SUBS = 16, GROUPS = 2, MOST = 7, OFFSET = 2;
  static constexpr bool SIGNED = false;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int group) {
    constexpr int RUN = H / 2, PLACE = H % 2 * 4 + S;
    const I third = mask_bytes(shift_right<RUN - 2>(shift_right(line(lines, PLACE), 4 * group)), 4);
    return mask_bytes(shift_right<2 * RUN>(line(lines, 8 + 8 * group + PLACE)), 3) | third;
  }
  static GOSSAMER_INLINE void scales(const uint8_t* lines, const uint8_t* halves, float* out) {
    const F d = load_fp16(half(halves, 0));
    const I a = line(lines, 24), b = line(lines, 25), c = line(lines, 26);
    const I packed[4] = {mask_bytes(a, 15) | mask_bytes(shift_right<-4>(c), 48),
                         mask_bytes(b, 15) | mask_bytes(shift_right<-2>(c), 48),
                         mask_bytes(shift_right<4>(a), 15) | mask_bytes(c, 48),
                         mask_bytes(shift_right<4>(b), 15) | mask_bytes(shift_right<2>(c), 48)};
    repeat<16>([&](auto j) GOSSAMER_LAMBDA {
      constexpr int J = decltype(j)::value;
      store(out + J * W, mul(d, sub(unsigned_byte<J % 4>(packed[J / 4]), set1(32.0f))));
    });
  }
};

struct Q6_K {
  static constexpr BlockType TYPE = BlockType::q6_k;
  static constexpr int SUB = 16, SUBS = 16, GROUPS = 2, MOST = 63, OFFSET = 5;
  static constexpr bool SIGNED = false;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int group) {
    constexpr int RUN = H / 2, PLACE = H % 2 * 4 + S;
    const I low = mask_bytes(shift_right<RUN / 2 * 4>(line(lines, 16 * group + RUN % 2 * 8 + PLACE)), 15);
    return low | mask_bytes(shift_right<2 * RUN - 4>(line(lines, 32 + 8 * group + PLACE)), 48);
  }
  static GOSSAMER_INLINE void scales(const uint8_t* lines, const uint8_t* halves, float* out) {
    const F d = load_fp16(half(halves, 0));
    repeat<16>([&](auto j) GOSSAMER_LAMBDA {
      constexpr int J = decltype(j)::value;
      store(out + J * W, mul(d, signed_byte<J % 4>(line(lines, 48 + J / 4))));
    });
  }
};

struct IQ4_XS {
  static constexpr BlockType TYPE = BlockType::iq4_xs;
  static constexpr int SUB = 32, SUBS = 8, GROUPS = 8, MOST = 255, OFFSET = 0;
  static constexpr bool SIGNED = true;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int group) {
    return look_up_bytes(gossamer::IQ4_VALUES, halved<S>(lines + (1 + 4 * group) * LINE));
  }
  static GOSSAMER_INLINE void scales(const uint8_t* lines, const uint8_t* halves, float* out) {
    const F d = load_fp16(half(halves, 0));
    const I high = load_uint16(half(halves, 1)), low = line(lines, 0);
    repeat<8>([&](auto j) GOSSAMER_LAMBDA {
      constexpr int J = decltype(j)::value;
      const I scale = and_int(shift_right<4 * J>(low), set1_int(15)) | and_int(shift_right<2 * J - 4>(high), set1_int(48));
      store(out + J * W, mul(d, to_float(sub_int(scale, set1_int(32)))));
    });
  }
};

// A block of another type, unpacked: 32 weights, a byte each, and in the place of the scales in 16 bit those that
// scales() computes.
template <int SUB_, int MOST_, bool SIGNED_, int OFFSET_>
struct Bytes {
  static constexpr int SUB = SUB_, SUBS = 32 / SUB, GROUPS = 1, MOST = MOST_, OFFSET = OFFSET_;
  static constexpr bool SIGNED = SIGNED_;
  template <int H, int S>
  static GOSSAMER_INLINE I codes(const uint8_t* lines, int) {
    return line(lines, H * SUB / 4 + S);
  }
};

// How far it is to the next block, in a strip of it.
template <class T>
struct Reading {
  static constexpr bool UNPACKED = false;
  static constexpr int LINE_BYTES = gossamer::layout_of(T::TYPE).words * LINE;
  static constexpr int SCALE_BYTES = gossamer::layout_of(T::TYPE).halves * 2 * W;
};
template <int SUB, int MOST, bool SIGNED, int OFFSET>
struct Reading<Bytes<SUB, MOST, SIGNED, OFFSET>> {
  static constexpr bool UNPACKED = true;
  static constexpr int LINE_BYTES = 8 * LINE;
  static constexpr int SCALE_BYTES = 32 / SUB * (OFFSET < 0 ? 2 : 1) * LINE;
};

template <class T>
using Unpacked = Bytes<T::SUB, T::MOST, T::SIGNED, T::OFFSET>;

}  // namespace GOSSAMER_NS
