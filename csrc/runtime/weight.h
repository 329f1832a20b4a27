// A packed weight, which can multiply on its own.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"
#include "workspace.h"

namespace gossamer {

// A packed weight and the memory it lives in.
class Weight {
 public:
  // `for_now`: it will soon be gone, or lose its zeros.
  Weight(const Kernels& kernels, Format format, int64_t n, int64_t k, bool has_bias, int64_t stored, Type stored_type, bool for_now);
  Weight(const Weight& from, SharedMemory memory);  // a copy that stands there
  // In blocks, of these types of each 16 outputs; `k` is a multiple of what their blocks hold.
  Weight(const Kernels& kernels, const std::vector<BlockType>& types, int64_t n, int64_t k, bool has_bias);
  // Rows of blocks (n) that stand elsewhere, and stay there.
  Weight(const Kernels& kernels, BlockType type, int64_t n, int64_t k, const uint8_t* rows);
  PackedWeight& packed() { return packed_; }
  const Kernels& kernels() const { return kernels_; }
  int64_t bytes() const { return static_cast<int64_t>(memory_.bytes()); }

  // Rows of the source matrix (rows, k); see FormatKernels::pack. For int8, `scale` (rows) too.
  void pack(const void* source, Type type, int64_t rows, int64_t first, int64_t part, int64_t parts, const float* scale);
  // Rows of blocks (rows, bytes of their type), on so many threads.
  void pack_blocks(const uint8_t* source, int64_t rows, int64_t first, int64_t part, int64_t parts, int threads);
  void set_bias(const float* bias, int64_t rows, int64_t first, int64_t part, int64_t parts);
  // `columns` (stored), and `store` (rows, stored) of their weights.
  void set_store(const int64_t* columns, const uint16_t* store, int64_t rows, int64_t first, int64_t part, int64_t parts);

  // Makes an int8 weight sparse, once it is packed.
  void drop_zeros();
  // The same weight in memory of its own, for now.
  std::shared_ptr<Weight> copy() const;

  // y (rows, n) fp32 = x W^T + b, for x (rows, k) fp32, outside of a program.
  void multiply(const float* x, int64_t rows, float* y, const Decomposition& rule, bool whole_columns, int threads);

 private:
  struct Workspace {
    PreparedRows rows;
    int64_t max_rows;
    std::vector<Thread> threads;
  };
  const Kernels& kernels_;
  PackedWeight packed_{};
  SharedMemory memory_;
  std::mutex mutex_;
  std::unique_ptr<Workspace> idle_;  // of the last product, for the next one
};

}  // namespace gossamer
