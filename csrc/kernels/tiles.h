// Matrix tiles: eight registers of up to 16 rows of 64 bytes each, and products of these (AMX, Intel's Architectures
// Software Developer's Manual, volume 1, chapter 18).
//
// A product adds up, for row m of a tile of activations and column n of a tile of weights, products of bytes in 32 bit,
// exact, or of bf16 in fp32. A tile of weights holds four bytes of each of 16 columns per row: what lies in a packed panel.
#pragma once

#include <type_traits>

#include "simd.h"

namespace GOSSAMER_NS {

constexpr int TILE_SIZE = 16;  // rows of a tile at most, and sums in a row

#if !defined(GOSSAMER_TILES)

// There are none.
constexpr bool HAS_TILES = false;
constexpr int MOST_TILED = 1;  // as arrays need one
inline void release_tiles() {}
inline void shape_tiles(int) {}
template <class Number>
void tile_products(const uint8_t*, const uint8_t*, int64_t, int64_t, int, const uint8_t*, int64_t, Number*, int64_t) {}

#else

constexpr bool HAS_TILES = true;
constexpr int MOST_TILED = 2 * TILE_SIZE;  // rows that are multiplied with a panel at a time

// The shapes of all tiles; a row of a tile of sums is 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

#if defined(GOSSAMER_EMULATE)

struct EmulatedTiles {
  TileShapes shapes;
  uint8_t tile[8][16][64];
};
inline thread_local EmulatedTiles emulated_tiles;

inline void use_tiles(const TileShapes& shapes) {
  emulated_tiles.shapes = shapes;
  std::memset(emulated_tiles.tile, 0, sizeof emulated_tiles.tile);
}
inline void release_tiles() { emulated_tiles.shapes = {}; }
template <int TILE>
void clear_tile() {
  std::memset(emulated_tiles.tile[TILE], 0, sizeof emulated_tiles.tile[TILE]);
}
template <int TILE>
void load_tile(const void* from, int64_t stride) {
  const EmulatedTiles& e = emulated_tiles;
  for (int r = 0; r < e.shapes.rows[TILE]; ++r)
    std::memcpy(emulated_tiles.tile[TILE][r], static_cast<const uint8_t*>(from) + r * stride, e.shapes.row_bytes[TILE]);
}
template <int TILE>
void store_tile(void* to, int64_t stride) {
  const EmulatedTiles& e = emulated_tiles;
  for (int r = 0; r < e.shapes.rows[TILE]; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, e.tile[TILE][r], e.shapes.row_bytes[TILE]);
}
// Activations, signed, times weights, unsigned.
inline void add_products(int32_t& sum, const uint8_t* a, const uint8_t (*weights)[64], int bytes) {
  for (int k = 0; k < bytes; ++k) sum += static_cast<int8_t>(a[k]) * weights[k / 4][k % 4];
}
// Even entries are added up apart from odd ones.
inline void add_products(float& sum, const uint8_t* a, const uint8_t (*weights)[64], int bytes) {
  float part[2] = {};
  for (int k = 0; k < bytes / 2; ++k) {
    uint16_t x, w;
    std::memcpy(&x, a + 2 * k, 2);
    std::memcpy(&w, weights[k / 2] + k % 2 * 2, 2);
    part[k % 2] = std::fma(bf16_value(x), bf16_value(w), part[k % 2]);
  }
  sum += part[0] + part[1];
}
template <class Number, int SUMS, int ACTIVATIONS, int WEIGHTS>
void multiply_tiles() {
  EmulatedTiles& e = emulated_tiles;
  for (int m = 0; m < e.shapes.rows[SUMS]; ++m)
    for (int n = 0; n < e.shapes.row_bytes[SUMS] / 4; ++n) {
      Number sum;
      std::memcpy(&sum, e.tile[SUMS][m] + 4 * n, 4);
      const auto column = reinterpret_cast<const uint8_t(*)[64]>(e.tile[WEIGHTS][0] + 4 * n);
      add_products(sum, e.tile[ACTIVATIONS][m], column, e.shapes.row_bytes[ACTIVATIONS]);
      std::memcpy(e.tile[SUMS][m] + 4 * n, &sum, 4);
    }
}

#else

// Compilers must not move accesses to what is loaded and stored across these: "memory".
GOSSAMER_INLINE void use_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
GOSSAMER_INLINE void release_tiles() { asm volatile("tilerelease"); }
template <int TILE>
GOSSAMER_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int TILE>
GOSSAMER_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
GOSSAMER_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
// Numbers of 32 bits: activations that are signed bytes, times weights that are not; floating point is bf16.
template <class Number, int SUMS, int ACTIVATIONS, int WEIGHTS>
GOSSAMER_INLINE void multiply_tiles() {
  if constexpr (std::is_same_v<Number, float>)
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(ACTIVATIONS), "i"(WEIGHTS));
  else
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(ACTIVATIONS), "i"(WEIGHTS));
}

#endif

// The rest of a panel, with zeros beyond its end, whatever the rows have there.
GOSSAMER_NOINLINE inline const uint8_t* padded(const uint8_t* panel, int64_t steps, uint8_t* out) {
  std::memset(out, 0, TILE_SIZE * gossamer::STEP_BYTES);
  std::memcpy(out, panel, steps * gossamer::STEP_BYTES);
  return out;
}

// For products of up to 32 rows: tiles 0 to 3 hold sums, of which 2 and 3 those of rows from 16 on, 4 and 5 activations, and
// 6 and 7 weights.
GOSSAMER_NOINLINE inline void shape_tiles(int rows) {
  const int first = rows < TILE_SIZE ? rows : TILE_SIZE, second = rows > TILE_SIZE ? rows - TILE_SIZE : 1;
  TileShapes shapes;
  repeat<2>([&](auto i) GOSSAMER_LAMBDA {
    constexpr int AT = decltype(i)::value;
    shapes.set(AT, first, 64);
    shapes.set(2 + AT, second, 64);
    shapes.set(4 + AT, AT ? second : first, 64);
    shapes.set(6 + AT, TILE_SIZE, 64);
  });
  use_tiles(shapes);
}

template <bool TWO, class Number>
GOSSAMER_NOINLINE void some_tile_products(const uint8_t* panel, const uint8_t* a, int64_t a_bytes, int64_t steps,
                                          const uint8_t* ahead, int64_t ahead_bytes, Number* sums, int64_t stride) {
  using gossamer::PANEL, gossamer::STEP_BYTES;
  clear_tile<0>();
  clear_tile<1>();
  if (TWO) clear_tile<2>();
  if (TWO) clear_tile<3>();
  alignas(64) uint8_t rest[TILE_SIZE * STEP_BYTES];
  for (int64_t k = 0; k < steps; k += TILE_SIZE) {
    const uint8_t* weights = panel + k * STEP_BYTES;
    if (k + TILE_SIZE > steps) weights = padded(weights, steps - k, rest);
    const uint8_t* soon = ahead + k * ahead_bytes;
    const auto fetch = [&](auto line) GOSSAMER_LAMBDA { __builtin_prefetch(soon + 64 * decltype(line)::value, 0, 2); };
    if (ahead) repeat<TILE_SIZE>(fetch);
    soon += 64 * TILE_SIZE;
    if (ahead && ahead_bytes == STEP_BYTES) repeat<TILE_SIZE>(fetch);
    load_tile<6>(weights, STEP_BYTES);
    load_tile<7>(weights + 64, STEP_BYTES);
    load_tile<4>(a + 4 * k, a_bytes);
    multiply_tiles<Number, 0, 4, 6>();
    multiply_tiles<Number, 1, 4, 7>();
    if constexpr (TWO) {
      load_tile<5>(a + TILE_SIZE * a_bytes + 4 * k, a_bytes);
      multiply_tiles<Number, 2, 5, 6>();
      multiply_tiles<Number, 3, 5, 7>();
    }
  }
  store_tile<0>(sums, 4 * stride);
  store_tile<1>(sums + 16, 4 * stride);
  if constexpr (TWO) {
    store_tile<2>(sums + TILE_SIZE * stride, 4 * stride);
    store_tile<3>(sums + TILE_SIZE * stride + 16, 4 * stride);
  }
}

// The products of `rows` rows of activations with the 32 columns of a panel, into sums (rows, 32) with `stride` numbers
// between rows: of signed bytes with unsigned ones, or of bf16, where there must be a multiple of 16 steps. `steps` are of
// four bytes. `ahead`, unless null, is memory to fetch meanwhile, 64 or 128 bytes per step. Tiles have been shaped for the rows.
template <class Number>
void tile_products(const uint8_t* panel, const uint8_t* a, int64_t a_bytes, int64_t steps, int rows, const uint8_t* ahead,
                   int64_t ahead_bytes, Number* sums, int64_t stride) {
  const auto products = rows > TILE_SIZE ? some_tile_products<true, Number> : some_tile_products<false, Number>;
  products(panel, a, a_bytes, steps, ahead, ahead_bytes, sums, stride);
}

#endif

}  // namespace GOSSAMER_NS
