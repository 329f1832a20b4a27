#include "workspace.h"

#include <cstring>

namespace gossamer {

Thread::Thread(int index, int64_t largest_k, int64_t attention_bytes) : index(index) {
  const int64_t k = round_up(largest_k, 64);
  memory = Memory(k * PANEL * 4 + k * 4 * 4 + 256 + k + k * PANEL + attention_bytes);
  uint8_t* p = memory.as<uint8_t>();
  const auto take = [&](int64_t bytes) {
    uint8_t* here = p;
    p += bytes;
    return here;
  };
  scratch = reinterpret_cast<float*>(take(k * PANEL * 4));
  index_of = reinterpret_cast<int32_t*>(take(k * 4));
  used = reinterpret_cast<int32_t*>(take(k * 4));
  row = reinterpret_cast<float*>(take(k * 4 + 256));
  merged = reinterpret_cast<float*>(take(k * 4));
  mask = take(k);
  entries = take(k * PANEL);
  attention = take(attention_bytes);
  std::fill(index_of, index_of + k, -1);
}

void Thread::hold_blocks(Type type, int64_t dim) {
  const int64_t keys = round_up(2 * INVARIANT_KEYS * kv_bytes(type, dim), 64), out = ATTENTION_ROWS * dim * 4;
  blocks = Memory(keys + out + ATTENTION_ROWS * 2 * 4);
  gathered = blocks.as<uint8_t>();
  block_out = reinterpret_cast<float*>(gathered + keys);
  block_state = reinterpret_cast<float*>(gathered + keys + out);
}

PreparedRows::PreparedRows(Type type, int64_t k, int64_t max_rows) {
  Prepared& x = view;
  x.type = type;
  x.k = k;
  x.stride = round_up(k, 64 / bytes_of(type));
  const int64_t data = round_up(max_rows * x.stride * bytes_of(type), 64);
  const int64_t each = round_up(max_rows * 4, 64);
  const int64_t blocks = type == Type::int8_blocks ? max_rows * (k / ROW_BLOCK_ENTRIES) * sizeof(RowBlock) : 0;
  memory = Memory(data + blocks + (type == Type::int8 ? 3 * each + 2 * max_rows * k * 4 : 0));
  uint8_t* p = memory.as<uint8_t>();
  x.data = p;
  if (blocks) x.blocks = reinterpret_cast<RowBlock*>(p + data);
  if (type == Type::int8) {
    x.scale = reinterpret_cast<float*>(p + data);
    x.sum = reinterpret_cast<int32_t*>(p + data + each);
    x.outliers = reinterpret_cast<int32_t*>(p + data + 2 * each);
    x.columns = reinterpret_cast<int32_t*>(p + data + 3 * each);
    x.values = reinterpret_cast<float*>(x.columns + max_rows * k);
  }
}

void mark(const Prepared& x, int64_t r, const Phase& phase, Thread& thread) {
  if (thread.marks != &phase) std::memset(thread.mask, 0, x.k);
  thread.marks = &phase;
  for (int32_t j = 0; j < x.outliers[r]; ++j) thread.mask[x.columns[r * x.k + j]] = 1;
}

Decomposition columns_of_all(const std::vector<Thread>& threads, const Phase& phase, Thread& thread, int64_t k) {
  uint8_t* all = reinterpret_cast<uint8_t*>(thread.used);
  std::memset(all, 0, k);
  for (const Thread& each : threads)
    if (each.marks == &phase)
      for (int64_t i = 0; i < k; ++i) all[i] |= each.mask[i];
  return {Extent::columns, false, 0, all};
}

void multiply_rows(const Kernels& kernels, LinearCall call, int64_t first, int64_t last) {
  for (call.first_row = first; call.first_row < last; call.first_row = call.last_row) {
    call.last_row = std::min(call.first_row + ROW_BLOCK, last);
    kernels.of(call.weight->format).multiply(call);
  }
}

void multiply_pieces(const Kernels& kernels, LinearCall call, int64_t count, Phase& phase, Thread& thread) {
  const int64_t panels = call.weight->panels, blocks = (count + ROW_BLOCK - 1) / ROW_BLOCK;
  // about four pieces of consecutive panels per thread: smaller ones would break the processor's own prefetching
  const int64_t grain = grain_of(panels, thread.count), pieces = (panels + grain - 1) / grain;
  call.scratch = thread.scratch;
  call.index = thread.index_of;
  call.used = thread.used;
  call.entries = thread.entries;
  phase.run(blocks * pieces, 1, [&](int64_t piece, int64_t) {
    const int64_t block = piece / pieces, panel = piece % pieces * grain;
    call.first_row = count * block / blocks;
    call.last_row = count * (block + 1) / blocks;
    call.first_panel = panel;
    call.last_panel = std::min(panel + grain, panels);
    kernels.of(call.weight->format).multiply(call);
  });
}

}  // namespace gossamer
