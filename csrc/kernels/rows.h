// Rows: made ready to be multiplied, normalized, converted, searched.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace GOSSAMER_NS {

using namespace gossamer;

inline float square_sum(const float* x, int64_t k) {
  F a = zero(), b = zero();
  int64_t i = 0;
  for (; i + 2 * W <= k; i += 2 * W) {
    a = fma(load(x + i), load(x + i), a);
    b = fma(load(x + i + W), load(x + i + W), b);
  }
  float sum = reduce_add(add(a, b));
  for (; i < k; ++i) sum += x[i] * x[i];
  return sum;
}

inline void scale_row(const float* x, float factor, const float* gain, int64_t k, float* out, bool add_to) {
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    F v = mul(load(x + i), set1(factor));
    if (gain) v = mul(v, load(gain + i));
    store(out + i, add_to ? add(load(out + i), v) : v);
  }
  for (; i < k; ++i) {
    const float v = gain ? x[i] * factor * gain[i] : x[i] * factor;
    out[i] = add_to ? out[i] + v : v;
  }
}

inline void layer_norm(const float* x, const float* gain, const float* bias, float epsilon, int64_t k, float* out) {
  F sums = zero();
  int64_t i = 0;
  for (; i + W <= k; i += W) sums = add(sums, load(x + i));
  float sum = reduce_add(sums);
  for (; i < k; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(k);
  for (i = 0; i + W <= k; i += W) store(out + i, sub(load(x + i), set1(mean)));
  for (; i < k; ++i) out[i] = x[i] - mean;
  const float inverse = 1.0f / __builtin_sqrtf(square_sum(out, k) / static_cast<float>(k) + epsilon);
  for (i = 0; i + W <= k; i += W) {
    const F v = mul(mul(load(out + i), set1(inverse)), load(gain + i));
    store(out + i, bias ? add(v, load(bias + i)) : v);
  }
  for (; i < k; ++i) out[i] = out[i] * inverse * gain[i] + (bias ? bias[i] : 0);
}

inline void convert(const float* x, int64_t n, void* out, Type type) {
  if (type == Type::f32) {
    std::memcpy(out, x, n * sizeof(float));
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(out);
  int64_t i = 0;
  for (; i + W <= n; i += W) store_bf16(half + i, load(x + i));
  for (; i < n; ++i) half[i] = bf16_bits(x[i]);
}

// Takes entry i of the row out of the int8 product.
inline void take_out(const Prepared& x, int64_t row, int64_t i, float* v) {
  const int32_t place = x.outliers[row]++;
  x.columns[row * x.k + place] = static_cast<int32_t>(i);
  x.values[row * x.k + place] = v[i];
  v[i] = 0;
}

// Entries of v (k) above what the criterion allows. `v` is padded to a multiple of W with zeros.
inline void find_outliers(const Prepared& x, int64_t row, float* v, float sum, const Decomposition& rule) {
  if (rule.extent == Extent::columns) {
    for (int64_t i = 0; i < x.k; ++i)
      if (rule.columns[i] && v[i] != 0) take_out(x, row, i, v);
    return;
  }
  float limit;
  if (rule.relative) {
    double total = sum;
    if (!(sum <= 3e38f)) {  // the sum does not fit into fp32, or there is a NaN
      total = 0;
      for (int64_t i = 0; i < x.k; ++i) total += v[i] < 0 ? -v[i] : v[i];
    }
    limit = rule.threshold * static_cast<float>(total / static_cast<double>(x.k));
  } else {
    uint32_t bits;  // greater than the next smaller number is at least the threshold
    std::memcpy(&bits, &rule.threshold, 4);
    --bits;
    std::memcpy(&limit, &bits, 4);
  }
  for (int64_t i = 0; i < x.k; i += W) {
    for (uint32_t found = greater_bits(abs(load(v + i)), set1(limit)); found; found &= found - 1)
      take_out(x, row, i + __builtin_ctz(found), v);
  }
}

// v (K) as int8 in blocks of 32, each with the scale of its largest entry. A block with an entry that is NaN or infinite
// becomes NaN.
inline void prepare_blocks(const Prepared& x, int64_t row, const float* v) {
  int8_t* codes = static_cast<int8_t*>(x.data) + row * x.stride;
  RowBlock* block = x.blocks + row * (x.k / ROW_BLOCK_ENTRIES);
  for (int64_t i = 0; i < x.k; i += ROW_BLOCK_ENTRIES, v += ROW_BLOCK_ENTRIES, codes += ROW_BLOCK_ENTRIES, ++block) {
    F largest = zero(), broken = zero();
    for (int j = 0; j < ROW_BLOCK_ENTRIES; j += W) {
      largest = max(largest, abs(load(v + j)));
      broken = fma(load(v + j), zero(), broken);
    }
    const float nothing = reduce_add(broken), scale = nothing == 0 ? reduce_max(largest) / 127 : nothing;
    int32_t pairs[2][2] = {};  // of each half
    if (scale > 0) {
      const F limit = set1(127.0f);
      for (int half = 0; half < 2; ++half) {
        I sums = zero_int();
        for (int j = 16 * half; j < 16 * half + 16; j += W) {
          const I code = round_to_int(max(min(div(load(v + j), set1(scale)), limit), sub(zero(), limit)));
          store_int8(codes + j, code);
          sums = add_int(sums, code);
        }
        alignas(64) int32_t lanes[W];
        store_int(lanes, sums);
        for (int j = 0; j < W; ++j) pairs[half][j / 2 % 2] += lanes[j];
      }
    } else {
      std::memset(codes, 0, ROW_BLOCK_ENTRIES);
    }
    const int32_t first = pairs[0][0] + pairs[0][1], second = pairs[1][0] + pairs[1][1];
    const auto scaled = [&](int32_t of) GOSSAMER_LAMBDA { return scale * static_cast<float>(of); };
    const auto minus = [](int32_t a, int32_t b) GOSSAMER_LAMBDA {
      return static_cast<uint32_t>(-a & 0xffff) | static_cast<uint32_t>(-b) << 16;
    };
    *block = {.scale = scale,
              .scaled_sum = scaled(first + second),
              .sum = first + second,
              .half_sum = {first, second},
              .scaled_half_sum = {scaled(first), scaled(second)},
              .minus_pairs = minus(pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1]),
              .minus_half_pairs = {minus(pairs[0][0], pairs[0][1]), minus(pairs[1][0], pairs[1][1])}};
  }
}

inline void prepare(const Prepared& x, int64_t row, const float* source, float inverse, const float* gain,
                    const Decomposition& rule, float* v) {
  const int64_t k = x.k, padded = (k + W - 1) / W * W;
  if (x.type == Type::int8_blocks) {
    if (inverse == 1 && !gain) return prepare_blocks(x, row, source);
    scale_row(source, inverse, gain, k, v, false);
    return prepare_blocks(x, row, v);
  }
  if (x.type != Type::int8) {
    uint8_t* out = static_cast<uint8_t*>(x.data) + row * x.stride * bytes_of(x.type);
    if (inverse == 1 && !gain) return convert(source, k, out, x.type);
    scale_row(source, inverse, gain, k, v, false);
    return convert(v, k, out, x.type);
  }
  scale_row(source, inverse, gain, k, v, false);
  for (int64_t i = k; i < padded; ++i) v[i] = 0;
  F size = zero(), broken = zero();
  for (int64_t i = 0; i < padded; i += W) {
    size = add(size, abs(load(v + i)));
    broken = fma(load(v + i), zero(), broken);  // NaN as soon as an entry is NaN or infinite
  }
  int8_t* codes = static_cast<int8_t*>(x.data) + row * x.stride;
  x.outliers[row] = 0;
  const float nothing = reduce_add(broken);
  if (nothing != nothing) {  // the whole row becomes NaN
    std::memset(codes, 0, x.stride);
    x.scale[row] = nothing;
    x.sum[row] = 0;
    return;
  }
  if (rule.extent != Extent::none) find_outliers(x, row, v, reduce_add(size), rule);
  F largest = zero();
  for (int64_t i = 0; i < padded; i += W) largest = max(largest, abs(load(v + i)));
  const float scale = reduce_max(largest) / 127;
  x.scale[row] = scale;
  if (scale == 0) {
    std::memset(codes, 0, x.stride);
    x.sum[row] = 0;
    return;
  }
  I sum = zero_int();
  const F limit = set1(127.0f);
  int8_t last[W];
  for (int64_t i = 0; i < padded; i += W) {
    // a quotient beyond 127 comes from a scale that is denormal, and rounded itself
    const F quotient = max(min(div(load(v + i), set1(scale)), limit), sub(zero(), limit));
    const I code = round_to_int(quotient);
    sum = add_int(sum, code);
    if (i + W <= x.stride) {
      store_int8(codes + i, code);
    } else {
      store_int8(last, code);
      std::memcpy(codes + i, last, x.stride - i);
    }
  }
  x.sum[row] = reduce_add_int(sum);
}

inline int64_t argmax(const float* x, int64_t n) {
  F largest = set1(-__builtin_inff());
  I broken = zero_int();  // negative where a NaN was seen
  int64_t i = 0;
  const auto look = [&](F v) GOSSAMER_LAMBDA {
    largest = max(largest, v);
    const I beyond = sub_int(set1_int(0x7f800000), and_int(as_int(v), set1_int(0x7fffffff)));
    broken = beyond | broken;
  };
  for (; i + W <= n; i += W) look(load(x + i));
  if (i < n) {
    float rest[W];
    for (int j = 0; j < W; ++j) rest[j] = i + j < n ? x[i + j] : -__builtin_inff();
    look(load(rest));
  }
  int32_t lane[W];
  store_int(lane, broken);
  for (int j = 0; j < W; ++j)
    if (lane[j] < 0) return -1;
  const float best = reduce_max(largest);
  if (!(best > -__builtin_inff())) return -1;
  // the first of equals: find the block, then the place
  const F just_below = set1(best);
  for (i = 0; i + W <= n; i += W) {
    const F v = load(x + i);
    const uint32_t less = greater_bits(just_below, v), all = (1u << (W - 1) << 1) - 1;
    if (less != all) return i + __builtin_ctz(~less);
  }
  for (; x[i] != best; ++i) {}
  return i;
}

}  // namespace GOSSAMER_NS
