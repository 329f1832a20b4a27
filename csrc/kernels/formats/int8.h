// Int8 weights, stored as code + 128.
#pragma once

#include "../gemm.h"

namespace GOSSAMER_NS {

using namespace gossamer;

struct Int8Format {
  using Dot = Int8Dot;
  static constexpr Type TYPE = Type::int8;
  static constexpr bool CODED = true, TILED = true;
  static constexpr uint8_t PADDING = 128;
  static constexpr int AHEAD = 2, FLIP = 0;

  static int64_t entry_bytes(int64_t steps) { return steps * STEP_BYTES; }
  static const uint8_t* entries(const LinearCall& c, int64_t panel) { return c.weight->panel(panel); }
  static bool few(const LinearCall&, int64_t, int32_t*) { return false; }
  static const uint8_t* step(const PackedWeight& w, int64_t panel, int64_t k, uint8_t*) { return w.panel(panel) + k * STEP_BYTES; }

  static void pack(PackedWeight& w, const void* source, Type, int64_t rows, int64_t first, int64_t part, int64_t parts) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = packed_row(first + r, part, parts);
      uint8_t* column = w.panel(n / PANEL) + n % PANEL * 4;
      for (int64_t k = 0; k < w.k; ++k)
        column[k / 4 * STEP_BYTES + k % 4] = static_cast<uint8_t>(static_cast<const int8_t*>(source)[r * w.k + k]) ^ 0x80;
    }
  }
  static void look_up(const PackedWeight& w, int64_t n, float factor, float* out) {
    const uint8_t* column = w.panel(n / PANEL) + n % PANEL * 4;
    const float scale = w.scale(n / PANEL)[n % PANEL];
    for (int64_t k = 0; k < w.k; ++k) out[k] = static_cast<float>(column[k / 4 * STEP_BYTES + k % 4] - 128) * scale * factor;
  }
};

}  // namespace GOSSAMER_NS
