// Weights in bf16 and fp32, entry by entry.
#pragma once

#include "../gemm.h"

namespace GOSSAMER_NS {

using namespace gossamer;

inline float element(const void* source, Type type, int64_t i) {
  switch (type) {
    case Type::f32: return static_cast<const float*>(source)[i];
    case Type::bf16: return bf16_value(static_cast<const uint16_t*>(source)[i]);
    case Type::fp16: return fp16_value(static_cast<const uint16_t*>(source)[i]);
    case Type::int8: return static_cast<const int8_t*>(source)[i];
  }
  return 0;
}

inline void put_number(uint16_t* to, const void* source, Type type, int64_t i) {
  *to = type == Type::bf16 ? static_cast<const uint16_t*>(source)[i] : bf16_bits(element(source, type, i));
}
inline void put_number(float* to, const void* source, Type type, int64_t i) { *to = element(source, type, i); }
inline float number(uint16_t bits) { return bf16_value(bits); }
inline float number(float x) { return x; }

template <Type OF, class Product, class Number>
struct FloatingFormat {
  using Dot = Product;
  static constexpr Type TYPE = OF;
  static constexpr bool CODED = false, TILED = OF == Type::bf16;
  static constexpr uint8_t PADDING = 0;
  static constexpr int AHEAD = 2;

  static int64_t entry_bytes(int64_t steps) { return steps * STEP_BYTES; }
  static const uint8_t* entries(const LinearCall& c, int64_t panel) { return c.weight->panel(panel); }
  static bool few(const LinearCall&, int64_t, float*) { return false; }

  static void pack(PackedWeight& w, const void* source, Type type, int64_t rows, int64_t first, int64_t part, int64_t parts) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = packed_row(first + r, part, parts);
      for (int64_t k = 0; k < w.k; ++k) {
        Number x;
        put_number(&x, source, type, r * w.k + k);
        std::memcpy(place(w, n, k), &x, sizeof x);
      }
    }
  }
  static void look_up(const PackedWeight& w, int64_t n, float factor, float* out) {
    for (int64_t k = 0; k < w.k; ++k) {
      Number x;
      std::memcpy(&x, place(w, n, k), sizeof x);
      out[k] = number(x) * factor;
    }
  }
  static uint8_t* place(const PackedWeight& w, int64_t n, int64_t k) {
    return w.panel(n / PANEL) + n % PANEL * 4 + k / Dot::step * STEP_BYTES + k % Dot::step * sizeof(Number);
  }
};

using Bf16Format = FloatingFormat<Type::bf16, Bf16Dot, uint16_t>;
using FloatFormat = FloatingFormat<Type::f32, FloatDot, float>;

}  // namespace GOSSAMER_NS
