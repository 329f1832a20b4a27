#include "weight.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace gossamer {

Weight::Weight(const Kernels& kernels, Format format, int64_t n, int64_t k, bool has_bias, int64_t stored, Type stored_type,
               bool for_now)
    : kernels_(kernels) {
  PackedWeight& w = packed_;
  const FormatKernels& of = kernels.of(format);
  w.format = format;
  w.type = of.type;
  w.n = n;
  w.k = k;
  w.panels = (n + PANEL - 1) / PANEL;
  w.steps = (k + step_of(of.type) - 1) / step_of(of.type);
  w.entry_bytes = of.entry_bytes(w.steps);
  w.stored = stored;
  w.stored_type = stored_type;
  w.stride = of.scaled ? w.scaled_bytes() : w.entry_bytes;
  const int64_t data = w.panels * w.stride, place = stored ? round_up(k * 4, 64) : 0;
  memory_ = SharedMemory(data + place + (has_bias ? w.panels * PANEL * 4 : 0), for_now);  // zeros
  w.data = memory_.data();
  if (stored) w.place = reinterpret_cast<int32_t*>(w.data + data);
  if (has_bias) w.bias = reinterpret_cast<float*>(w.data + data + place);
  if (of.padding)
    for (int64_t p = 0; p < w.panels; ++p) std::memset(w.panel(p), of.padding, w.entry_bytes);
}

namespace {

void check_blocks(BlockType type, int64_t k) {
  const BlockLayout of = layout_of(type);
  if (!of.weights) throw std::invalid_argument("there is no such type of blocks");
  if (k % of.weights) throw std::invalid_argument("rows are not whole blocks");
}

}  // namespace

Weight::Weight(const Kernels& kernels, const std::vector<BlockType>& types, int64_t n, int64_t k, bool has_bias) : kernels_(kernels) {
  PackedWeight& w = packed_;
  w.format = Format::blocks;
  w.type = kernels.of(w.format).type;
  w.n = n;
  w.k = k;
  w.panels = (n + PANEL - 1) / PANEL;
  w.steps = k / step_of(w.type);
  w.few_rows = 4;
  if (static_cast<int64_t>(types.size()) != w.panels * 2) throw std::invalid_argument("each 16 outputs need a type");
  std::vector<int64_t> start(w.panels + 1);
  for (int64_t p = 0; p < w.panels; ++p) {
    for (int64_t i = 2 * p; i < 2 * p + 2; ++i) check_blocks(types[i], k);
    start[p + 1] = start[p] + group_bytes(types[2 * p], k) + group_bytes(types[2 * p + 1], k);
  }
  const int64_t data = start.back(), starts = round_up((w.panels + 1) * 8, 64), kinds = round_up(w.panels * 2, 64);
  memory_ = SharedMemory(data + starts + kinds + (has_bias ? w.panels * PANEL * 4 : 0));  // zeros, which are weights of 0
  w.data = memory_.data();
  w.start = reinterpret_cast<int64_t*>(w.data + data);
  std::copy(start.begin(), start.end(), w.start);
  w.types = reinterpret_cast<BlockType*>(w.data + data + starts);
  std::copy(types.begin(), types.end(), w.types);
  if (has_bias) w.bias = reinterpret_cast<float*>(w.data + data + starts + kinds);
}

Weight::Weight(const Kernels& kernels, BlockType type, int64_t n, int64_t k, const uint8_t* rows) : kernels_(kernels) {
  check_blocks(type, k);
  PackedWeight& w = packed_;
  w.format = Format::stored_rows;
  w.type = kernels.of(w.format).type;
  w.n = n;
  w.k = k;
  memory_ = SharedMemory(1);
  w.types = reinterpret_cast<BlockType*>(memory_.data());
  *w.types = type;
  w.stride = k / layout_of(type).weights * layout_of(type).bytes;
  w.data = const_cast<uint8_t*>(rows);  // never written
}

void Weight::pack_blocks(const uint8_t* source, int64_t rows, int64_t first, int64_t part, int64_t parts, int threads) {
  PackedWeight& w = packed_;
  const BlockType type = w.types[packed_row(first, part, parts) / 16];
  const BlockLayout of = layout_of(type);
  const int64_t row_bytes = w.k / of.weights * of.bytes, pieces = (rows + 15) / 16;
  for (int64_t r = 0; r < rows; r += 16)
    if (w.types[packed_row(first + r, part, parts) / 16] != type) throw std::invalid_argument("rows of two types in one part");
  Phase phase;
  run_parallel(threads, [&](int) {
    phase.run(pieces, 1, [&](int64_t piece, int64_t) {
      const int64_t begin = piece * 16, count = std::min<int64_t>(16, rows - begin);
      kernels_.of(w.format).pack(w, source + begin * row_bytes, w.type, count, first + begin, part, parts);
    });
  });
}

void Weight::pack(const void* source, Type type, int64_t rows, int64_t first, int64_t part, int64_t parts, const float* scale) {
  const FormatKernels& of = kernels_.of(packed_.format);
  of.pack(packed_, source, type, rows, first, part, parts);
  if (!of.scaled) return;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = packed_row(first + r, part, parts);
    packed_.scale(n / PANEL)[n % PANEL] = scale[r];
  }
}

void Weight::set_bias(const float* bias, int64_t rows, int64_t first, int64_t part, int64_t parts) {
  for (int64_t r = 0; r < rows; ++r) packed_.bias[packed_row(first + r, part, parts)] = bias[r];
}

void Weight::set_store(const int64_t* columns, const uint16_t* store, int64_t rows, int64_t first, int64_t part, int64_t parts) {
  PackedWeight& w = packed_;
  std::fill(w.place, w.place + w.k, -1);
  for (int64_t s = 0; s < w.stored; ++s) w.place[columns[s]] = static_cast<int32_t>(s);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = packed_row(first + r, part, parts);
    for (int64_t s = 0; s < w.stored; ++s) w.store(n / PANEL)[s * PANEL + n % PANEL] = store[r * w.stored + s];
  }
}

void Weight::drop_zeros() {
  const PackedWeight dense = packed_;
  if (dense.format != Format::int8) throw std::logic_error("only an int8 weight with its zeros can drop them");
  const int64_t entries = dense.entry_bytes, store_bytes = dense.stride - entries;
  std::vector<int64_t> start(dense.panels + 1);
  PackedWeight sparse = dense;
  sparse.format = Format::sparse_int8;
  sparse.entry_bytes = kernels_.of(sparse.format).entry_bytes(dense.steps);
  sparse.start = start.data();
  for (int64_t p = 0; p < dense.panels; ++p) {
    const int64_t codes = entries - std::count(dense.panel(p), dense.panel(p) + entries, 128);
    start[p + 1] = round_up(start[p] + sparse.scaled_bytes() + codes, 16);
  }
  const int64_t data = round_up(start.back() + READ_AHEAD, 64), place = dense.place ? round_up(dense.k * 4, 64) : 0;
  const int64_t starts = round_up((dense.panels + 1) * 8, 64), bias = dense.bias ? dense.panels * PANEL * 4 : 0;
  SharedMemory memory(data + place + starts + bias);
  sparse.data = memory.data();
  sparse.start = reinterpret_cast<int64_t*>(sparse.data + data + place);
  std::copy(start.begin(), start.end(), sparse.start);
  if (dense.place) {
    sparse.place = reinterpret_cast<int32_t*>(sparse.data + data);
    std::copy(dense.place, dense.place + dense.k, sparse.place);
  }
  if (dense.bias) {
    sparse.bias = reinterpret_cast<float*>(sparse.data + data + place + starts);
    std::copy(dense.bias, dense.bias + dense.panels * PANEL, sparse.bias);
  }
  for (int64_t p = 0; p < dense.panels; ++p) {
    const uint8_t* from = dense.panel(p);
    uint8_t *mask = sparse.panel(p), *code = sparse.codes(p);
    std::memcpy(sparse.store(p), dense.store(p), store_bytes);
    for (int64_t k = 0; k < dense.steps; ++k, from += STEP_BYTES, mask += MASK_BYTES) {
      if (k % RANK_STEPS == 0) sparse.rank(p)[k / RANK_STEPS] = static_cast<int32_t>(code - sparse.codes(p));
      for (int i = 0; i < STEP_BYTES; ++i) {
        const bool set = from[i] != 128;
        mask[i / 8] = static_cast<uint8_t>(mask[i / 8] | set << i % 8);
        if (set) *code++ = from[i] ^ 0x80;
      }
    }
  }
  packed_ = sparse;
  memory_ = std::move(memory);
}

Weight::Weight(const Weight& from, SharedMemory memory) : kernels_(from.kernels_), packed_(from.packed_), memory_(std::move(memory)) {
  const auto moved = [&](auto*& pointer) {
    if (!pointer) return;
    const int64_t at = reinterpret_cast<uint8_t*>(pointer) - from.memory_.data();
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory_.data() + at);
  };
  moved(packed_.data);
  moved(packed_.start);
  moved(packed_.types);
  moved(packed_.place);
  moved(packed_.bias);
  std::memcpy(memory_.data(), from.memory_.data(), memory_.bytes());
}

std::shared_ptr<Weight> Weight::copy() const {
  return std::make_shared<Weight>(*this, SharedMemory(memory_.bytes(), true));
}

void Weight::multiply(const float* x, int64_t rows, float* y, const Decomposition& rule, bool whole_columns, int threads) {
  const PackedWeight& w = packed_;
  const Kernels& kernels = kernels_;
  std::unique_ptr<Workspace> work;
  {
    std::lock_guard lock(mutex_);  // another thread that multiplies meanwhile makes its own
    work = std::move(idle_);
  }
  if (!work || work->max_rows < rows) work.reset(new Workspace{PreparedRows(w.type, w.k, rows), rows, {}});
  std::vector<Thread>& own = work->threads;
  while (static_cast<int>(own.size()) < threads) own.emplace_back(static_cast<int>(own.size()), w.k, 0);
  const Prepared& prepared = work->rows.view;
  for (Thread& thread : own) thread.marks = nullptr;
  Phase first, second, third;
  run_parallel(threads, [&](int index) {
    Thread& thread = own[index];
    thread.count = threads;
    const auto prepare = [&](Phase& phase, const Phase* marked) {
      phase.run(rows, grain_of(rows, threads), [&](int64_t begin, int64_t end) {
        const Decomposition now = marked ? columns_of_all(own, *marked, thread, w.k) : rule;
        for (int64_t r = begin; r < end; ++r) {
          kernels.prepare(prepared, r, x + r * w.k, 1.0f, nullptr, now, thread.row);
          if (whole_columns && !marked) mark(prepared, r, phase, thread);
        }
      });
    };
    prepare(first, nullptr);
    if (whole_columns) prepare(second, &first);
    LinearCall call{};
    call.weight = &w;
    call.x = &prepared;
    call.y = y;
    call.y_stride = call.y_columns = w.n;
    multiply_pieces(kernels, call, rows, third, thread);
  });
  std::lock_guard lock(mutex_);
  idle_ = std::move(work);
}

}  // namespace gossamer
