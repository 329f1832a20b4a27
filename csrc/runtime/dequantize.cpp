// The values of quantized blocks. CMakeLists.txt compiles this without contraction: a product and a sum that were rounded
// once, as a fused multiply-add, would differ from everybody else's values in the last bit.
#include <cstring>

#include "kernels/block_types.h"

namespace gossamer {

namespace {

uint16_t half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}
uint32_t word_at(const uint8_t* p) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float fp16(const uint8_t* p) {
  const uint16_t bits = half_at(p);
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -small : small;
}

int low(uint8_t byte) { return byte & 15; }
int high(uint8_t byte) { return byte >> 4; }

// Code of weight k in 16 bytes that hold two each: k and k + 16.
int nibble(const uint8_t* codes, int k) { return k < 16 ? low(codes[k]) : high(codes[k - 16]); }

// The scale and the minimum of eight sub-blocks, six bits each.
void six_bits(const uint8_t* b, int j, int& scale, int& min) {
  scale = j < 4 ? b[j] & 63 : low(b[j + 4]) | b[j - 4] >> 6 << 4;
  min = j < 4 ? b[j + 4] & 63 : high(b[j + 4]) | b[j] >> 6 << 4;
}

void q4_or_q5_k(const uint8_t* block, bool five, float* out) {
  const float d = fp16(block), dmin = fp16(block + 2);
  const uint8_t *high_bits = block + 16, *codes = block + (five ? 48 : 16);
  for (int k = 0; k < 256; ++k) {
    const int j = k / 32, l = k % 32;
    int scale, min;
    six_bits(block + 4, j, scale, min);
    const uint8_t byte = codes[j / 2 * 32 + l];
    int code = j % 2 ? high(byte) : low(byte);
    if (five) code |= (high_bits[l] >> j & 1) << 4;
    const float product = (d * static_cast<float>(scale)) * static_cast<float>(code);
    out[k] = product - dmin * static_cast<float>(min);
  }
}

void q2_k(const uint8_t* block, float* out) {
  const float d = fp16(block + 80), dmin = fp16(block + 82);
  for (int k = 0; k < 256; ++k) {
    const uint8_t scale = block[k / 16];
    const int code = block[16 + k / 128 * 32 + k % 32] >> k % 128 / 32 * 2 & 3;
    const float product = (d * static_cast<float>(low(scale))) * static_cast<float>(code);
    out[k] = product - dmin * static_cast<float>(high(scale));
  }
}

void q3_k(const uint8_t* block, float* out) {
  const float d = fp16(block + 108);
  const uint8_t* packed = block + 96;
  for (int k = 0; k < 256; ++k) {
    const int j = k / 16, l = k % 32;
    const int scale = (j < 8 ? low(packed[j]) : high(packed[j - 8])) | (packed[8 + j % 4] >> j / 4 * 2 & 3) << 4;
    const int code = (block[32 + k / 128 * 32 + l] >> k % 128 / 32 * 2 & 3) - (block[l] >> k / 32 & 1 ? 0 : 4);
    out[k] = (d * static_cast<float>(scale - 32)) * static_cast<float>(code);
  }
}

void q6_k(const uint8_t* block, float* out) {
  const float d = fp16(block + 208);
  for (int k = 0; k < 256; ++k) {
    const int n = k / 128, i = k % 128 / 32, l = k % 32;
    const uint8_t byte = block[64 * n + 32 * (i & 1) + l];
    const int code = (i < 2 ? low(byte) : high(byte)) | (block[128 + 32 * n + l] >> 2 * i & 3) << 4;
    const float scale = d * static_cast<float>(static_cast<int8_t>(block[192 + k / 16]));
    out[k] = scale * static_cast<float>(code - 32);
  }
}

void iq4_xs(const uint8_t* block, float* out) {
  const float d = fp16(block);
  const int highs = half_at(block + 2);
  for (int j = 0; j < 8; ++j) {
    const uint8_t pair = block[4 + j / 2];
    const int scale = (j % 2 ? high(pair) : low(pair)) | (highs >> 2 * j & 3) << 4;
    const float each = d * static_cast<float>(scale - 32);
    for (int k = 0; k < 32; ++k) out[32 * j + k] = each * static_cast<float>(IQ4_VALUES[nibble(block + 8 + 16 * j, k)]);
  }
}

float power_of_two(uint8_t e) { return float_of(e < 2 ? 0x00200000u << e : (e - 1u) << 23); }  // 2^(e - 128)

}  // namespace

void dequantize(BlockType type, const uint8_t* block, float* out) {
  switch (type) {
    case BlockType::q4_0: {
      const float d = fp16(block);
      for (int k = 0; k < 32; ++k) out[k] = d * static_cast<float>(nibble(block + 2, k) - 8);
      return;
    }
    case BlockType::q4_1: {
      const float d = fp16(block), m = fp16(block + 2);
      for (int k = 0; k < 32; ++k) {
        const float product = d * static_cast<float>(nibble(block + 4, k));
        out[k] = product + m;
      }
      return;
    }
    case BlockType::q5_0: {
      const float d = fp16(block);
      const uint32_t bits = word_at(block + 2);
      for (int k = 0; k < 32; ++k) {
        const int code = nibble(block + 6, k) | static_cast<int>(bits >> k & 1) << 4;
        out[k] = d * static_cast<float>(code - 16);
      }
      return;
    }
    case BlockType::q5_1: {
      const float d = fp16(block), m = fp16(block + 2);
      const uint32_t bits = word_at(block + 4);
      for (int k = 0; k < 32; ++k) {
        const int code = nibble(block + 8, k) | static_cast<int>(bits >> k & 1) << 4;
        const float product = d * static_cast<float>(code);
        out[k] = product + m;
      }
      return;
    }
    case BlockType::q8_0: {
      const float d = fp16(block);
      for (int k = 0; k < 32; ++k) out[k] = d * static_cast<float>(static_cast<int8_t>(block[2 + k]));
      return;
    }
    case BlockType::q2_k: return q2_k(block, out);
    case BlockType::q3_k: return q3_k(block, out);
    case BlockType::q4_k: return q4_or_q5_k(block, false, out);
    case BlockType::q5_k: return q4_or_q5_k(block, true, out);
    case BlockType::q6_k: return q6_k(block, out);
    case BlockType::iq4_nl: {
      const float d = fp16(block);
      for (int k = 0; k < 32; ++k) out[k] = d * static_cast<float>(IQ4_VALUES[nibble(block + 2, k)]);
      return;
    }
    case BlockType::iq4_xs: return iq4_xs(block, out);
    case BlockType::mxfp4: {
      const float d = power_of_two(block[0]);
      for (int k = 0; k < 32; ++k) out[k] = d * static_cast<float>(MXFP4_VALUES[nibble(block + 1, k)]);
      return;
    }
    case BlockType::group4_fp16:
    case BlockType::group4_bf16: {
      const float d = type == BlockType::group4_fp16 ? fp16(block) : float_of(static_cast<uint32_t>(half_at(block)) << 16);
      const int zero = half_at(block + 2);
      for (int k = 0; k < 32; ++k) out[k] = d * static_cast<float>(nibble(block + 4, k) - zero);
      return;
    }
  }
}

}  // namespace gossamer
