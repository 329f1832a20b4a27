// Products with weights in quantized blocks, of every type and instruction set that this processor has, against sums in
// fp64: for processors that run these kernels but not the Python tests, such as an emulated one. See `make emulate-arm`.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/block_types.h"
#include "runtime/weight.h"

using namespace gossamer;

namespace {

constexpr BlockType TYPES[] = {BlockType::q4_0, BlockType::q4_1, BlockType::q5_0, BlockType::q5_1, BlockType::q8_0,
                               BlockType::q2_k, BlockType::q3_k, BlockType::q4_k, BlockType::q5_k, BlockType::q6_k,
                               BlockType::iq4_nl, BlockType::iq4_xs, BlockType::mxfp4, BlockType::group4_fp16,
                               BlockType::group4_bf16};
std::mt19937 random_bits(20);

// Rows of random blocks, whose scales are normal numbers of either sign.
std::vector<uint8_t> random_rows(BlockType type, int64_t n, int64_t k) {
  const BlockLayout of = layout_of(type);
  std::vector<uint8_t> rows(n * (k / of.weights) * of.bytes);
  for (uint8_t& byte : rows) byte = static_cast<uint8_t>(random_bits());
  for (size_t at = 0; at < rows.size(); at += of.bytes)
    for (int i = 0; i < of.halves; ++i) {
      uint16_t bits = static_cast<uint16_t>((random_bits() & 0x83ff) | 0x2800);  // fp16 of about 1/32
      if (type == BlockType::group4_bf16) bits = static_cast<uint16_t>((random_bits() & 0x807f) | 0x3d00);
      if (i == 1 && (type == BlockType::group4_fp16 || type == BlockType::group4_bf16)) bits = random_bits() % 16;
      if (i == 1 && type == BlockType::iq4_xs) bits = static_cast<uint16_t>(random_bits());
      if (type == BlockType::mxfp4) rows[at + of.half[i]] = static_cast<uint8_t>(118 + random_bits() % 8);
      else std::memcpy(&rows[at + of.half[i]], &bits, 2);
    }
  return rows;
}

// x in int8 with a scale for every 32, as numbers.
std::vector<double> rounded(const std::vector<float>& x) {
  std::vector<double> out(x.size());
  for (size_t at = 0; at < x.size(); at += ROW_BLOCK_ENTRIES) {
    float largest = 0;
    for (int i = 0; i < ROW_BLOCK_ENTRIES; ++i) largest = std::max(largest, std::fabs(x[at + i]));
    const float scale = largest / 127;
    for (int i = 0; i < ROW_BLOCK_ENTRIES && scale > 0; ++i)
      out[at + i] = static_cast<double>(std::nearbyint(x[at + i] / scale)) * scale;
  }
  return out;
}

int check(const Kernels& kernels, BlockType type, int64_t n, int64_t k, int64_t rows) {
  const BlockLayout of = layout_of(type);
  const std::vector<uint8_t> source = random_rows(type, n, k);
  std::vector<float> weight(n * k);
  for (int64_t b = 0; b < n * k / of.weights; ++b) dequantize(type, &source[b * of.bytes], &weight[b * of.weights]);
  Weight packed(kernels, std::vector<BlockType>((n + PANEL - 1) / PANEL * 2, type), n, k, false);
  packed.pack_blocks(source.data(), n, 0, 0, 1, 1);
  std::vector<float> x(rows * k), y(rows * n), again(rows * n), row(k);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random_bits);
  x[5] = 300;                                    // an outlier
  for (int64_t i = 0; i < k; ++i) x[k + i] = 0;  // zeros
  int faults = 0;
  const auto fault = [&](const char* what) {
    if (!faults++) std::printf("%s, type %d, %ld x %ld: %s\n", kernels.name, static_cast<int>(type), long(n), long(k), what);
  };
  for (int64_t few : {0, 8}) {  // how many rows are few changes no bit
    packed.packed().few_rows = few;
    packed.multiply(x.data(), rows, few ? again.data() : y.data(), {}, false, 1);
  }
  if (std::memcmp(y.data(), again.data(), y.size() * 4)) fault("rows are not the same, packed and unpacked");
  for (int64_t r = 0; r < rows; ++r) {
    packed.multiply(&x[r * k], 1, row.data(), {}, false, 1);
    if (std::memcmp(row.data(), &y[r * n], std::min(n, k) * 4)) fault("a row alone is another one");
  }
  const std::vector<double> exact = rounded(x);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        sum += exact[r * k + i] * weight[j * k + i];
        size += std::fabs(exact[r * k + i] * weight[j * k + i]);
      }
      // fp32 sums of exact integers, one for each 16 weights or more
      if (!(std::fabs(y[r * n + j] - sum) <= (k / 16.0 + 4) * std::ldexp(size, -24) + 1e-30)) fault("a product is wrong");
    }
  for (int64_t j : {int64_t{0}, n - 1}) {
    kernels.of(Format::blocks).look_up(packed.packed(), j, 1.0f, row.data());
    if (std::memcmp(row.data(), &weight[j * k], k * 4)) fault("a row that is looked up is another one");
  }
  return faults;
}

}  // namespace

int main() {
  int faults = 0, checks = 0;
  for (const Kernels* const* kernels = available(); *kernels; ++kernels) {
    std::printf("%s\n", (*kernels)->name);
    for (BlockType type : TYPES)
      for (int64_t k : {256, 768}) {
        faults += check(**kernels, type, 75, k, 9);
        ++checks;
      }
  }
  std::printf("%d checks, %d faults\n", checks, faults);
  return faults ? 1 : 0;
}
