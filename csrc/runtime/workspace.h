// Memory of threads, and the parts of a product that they share: rows made ready, marked columns, pieces of panels.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"
#include "threads.h"

namespace gossamer {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The number of `count` pieces that a thread takes at a time, so that each takes about four times.
inline int64_t grain_of(int64_t count, int threads) { return std::max<int64_t>(1, (count + 4 * threads - 1) / (4 * threads)); }

// Memory that an op may use of its thread while it runs.
struct Thread {
  int index = 0, count = 1;
  float* scratch;      // (largest k, 32) floats
  int32_t* index_of;   // (largest k), all -1
  int32_t* used;       // (largest k)
  float* row;          // (largest k + 16)
  float* merged;       // (largest k)
  uint8_t* mask;       // (largest k)
  uint8_t* entries;    // (largest k, 32): of a panel
  const void* marks = nullptr;  // the phase that the mask belongs to
  uint8_t* attention;
  std::vector<float*> outs, states;
  std::vector<float> rates, matrix;  // of a recurrence
  // Of a block of keys, where the shape is invariant: keys and values from several items, and what rows get from it.
  uint8_t* gathered = nullptr;
  float *block_out = nullptr, *block_state = nullptr;
  Memory memory, blocks;

  Thread(int index, int64_t largest_k, int64_t attention_bytes);
  // Room for what is of a block of keys, of heads of this type and size.
  void hold_blocks(Type type, int64_t dim);
};

// Prepared rows and the memory they live in.
struct PreparedRows {
  Prepared view{};
  Memory memory;
  PreparedRows(Type type, int64_t k, int64_t max_rows);
};

// Notes the columns in which row r has outliers. The mask of a thread belongs to the phase in which it was last written.
void mark(const Prepared& x, int64_t r, const Phase& phase, Thread& thread);

// Every column in which any row has an outlier, as the threads have marked them in that phase.
Decomposition columns_of_all(const std::vector<Thread>& threads, const Phase& phase, Thread& thread, int64_t k);

// The product of some rows, on this thread. The weight is not int8: the call needs no memory of the thread.
void multiply_rows(const Kernels& kernels, LinearCall call, int64_t first, int64_t last);

// A thread's part of a product of `count` rows.
void multiply_pieces(const Kernels& kernels, LinearCall call, int64_t count, Phase& phase, Thread& thread);

}  // namespace gossamer
