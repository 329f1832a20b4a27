// Quantized blocks as files hold them: what the bytes of a block are, and where they go in a packed strip.
//
// The types of GGUF have the numbers that GGUF gives them (https://github.com/ggml-org/ggml, ggml-common.h describes the
// bytes); a row of a matrix is a run of blocks. `group4` is what 4-bit weights of other files become: a scale in fp16 or
// bf16, a zero point in 16 bit, 16 bytes of codes; value = scale * (code - zero). Functions here are static: each
// instruction set has its own; see kernels.cpp.
#pragma once

#include <cstdint>

namespace gossamer {

enum class BlockType : uint8_t {
  q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8,
  q2_k = 10, q3_k = 11, q4_k = 12, q5_k = 13, q6_k = 14,
  iq4_nl = 20, iq4_xs = 23, mxfp4 = 39,
  group4_fp16 = 200, group4_bf16 = 201,
};

// A block: `words` of four bytes from `first_word` on, and scales of 16 bit (for MXFP4 of 8) that begin at these bytes.
struct BlockLayout {
  int weights, bytes;
  int first_word, words;
  int halves, half[2];
};

static constexpr BlockLayout layout_of(BlockType type) {
  switch (type) {
    case BlockType::q4_0: return {32, 18, 2, 4, 1, {0, 0}};
    case BlockType::q4_1: return {32, 20, 4, 4, 2, {0, 2}};
    case BlockType::q5_0: return {32, 22, 2, 5, 1, {0, 0}};
    case BlockType::q5_1: return {32, 24, 4, 5, 2, {0, 2}};
    case BlockType::q8_0: return {32, 34, 2, 8, 1, {0, 0}};
    case BlockType::q2_k: return {256, 84, 0, 20, 2, {80, 82}};
    case BlockType::q3_k: return {256, 110, 0, 27, 1, {108, 0}};
    case BlockType::q4_k: return {256, 144, 4, 35, 2, {0, 2}};
    case BlockType::q5_k: return {256, 176, 4, 43, 2, {0, 2}};
    case BlockType::q6_k: return {256, 210, 0, 52, 1, {208, 0}};
    case BlockType::iq4_nl: return {32, 18, 2, 4, 1, {0, 0}};
    case BlockType::iq4_xs: return {256, 136, 4, 33, 2, {0, 2}};
    case BlockType::mxfp4: return {32, 17, 1, 4, 1, {0, 0}};
    case BlockType::group4_fp16:
    case BlockType::group4_bf16: return {32, 20, 4, 4, 2, {0, 2}};
  }
  return {0, 0, 0, 0, 0, {0, 0}};  // no such type
}

// Of 16 outputs in a packed weight.
static constexpr int64_t group_bytes(BlockType type, int64_t k) {
  const BlockLayout of = layout_of(type);
  return (k / of.weights * (4 * of.words + 2 * of.halves) * 16 + 63) / 64 * 64;
}

// Codes of IQ4_NL and IQ4_XS, and of MXFP4 twice their values.
alignas(16) constexpr int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(16) constexpr int8_t MXFP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// out (weights of a block): the values, rounded as the numpy code of gguf-py rounds them, to the bit.
void dequantize(BlockType type, const uint8_t* block, float* out);

// The high bits of Q5_0 and Q5_1: in a file bit k belongs to code k; in a strip bit 8 b + i to code 4 i + b, so that a
// shift brings those of four neighbours to the same place of four bytes.
static constexpr uint32_t spread_high_bits(uint32_t bits) {
  uint32_t out = 0;
  for (int k = 0; k < 32; ++k) out |= (bits >> k & 1) << (k % 4 * 8 + k / 4);
  return out;
}
static constexpr uint32_t gather_high_bits(uint32_t bits) {
  uint32_t out = 0;
  for (int k = 0; k < 32; ++k) out |= (bits >> (k % 4 * 8 + k / 4) & 1) << k;
  return out;
}

}  // namespace gossamer
