#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace gossamer {

namespace {

constexpr int64_t SHORT = 16384;         // bytes of keys that are fetched while the task before is computed
constexpr int64_t KEYS_OF_A_TASK = 512;  // at least, where the keys of a few rows are split among threads

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t grain_of(int64_t count, int threads) { return std::max<int64_t>(1, (count + 4 * threads - 1) / (4 * threads)); }

std::vector<float> copy(const float* gain, int64_t k) { return gain ? std::vector<float>(gain, gain + k) : std::vector<float>(); }

const float* or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

// Notes the columns in which row r has outliers. The mask of a thread belongs to the phase in which it was last written.
void mark(const Prepared& x, int64_t r, const Phase& phase, Thread& thread) {
  if (thread.marks != &phase) std::memset(thread.mask, 0, x.k);
  thread.marks = &phase;
  for (int32_t j = 0; j < x.outliers[r]; ++j) thread.mask[x.columns[r * x.k + j]] = 1;
}

// Every column in which any row has an outlier, as the threads have marked them in that phase.
Decomposition columns_of_all(const std::vector<Thread>& threads, const Phase& phase, Thread& thread, int64_t k) {
  uint8_t* all = reinterpret_cast<uint8_t*>(thread.used);
  std::memset(all, 0, k);
  for (const Thread& each : threads)
    if (each.marks == &phase)
      for (int64_t i = 0; i < k; ++i) all[i] |= each.mask[i];
  return {Extent::columns, false, 0, all};
}

// A thread's part of a product of `count` rows.
void multiply_pieces(const Kernels& kernels, LinearCall call, int64_t count, Phase& phase, Thread& thread) {
  const int64_t panels = call.weight->panels, blocks = (count + ROW_BLOCK - 1) / ROW_BLOCK;
  // about four pieces of consecutive panels per thread: smaller ones would break the processor's own prefetching
  const int64_t grain = grain_of(panels, thread.count), pieces = (panels + grain - 1) / grain;
  call.scratch = thread.scratch;
  call.index = thread.index_of;
  call.used = thread.used;
  phase.run(blocks * pieces, 1, [&](int64_t piece, int64_t) {
    const int64_t block = piece / pieces, panel = piece % pieces * grain;
    call.first_row = count * block / blocks;
    call.last_row = count * (block + 1) / blocks;
    call.first_panel = panel;
    call.last_panel = std::min(panel + grain, panels);
    kernels.linear(call);
  });
}

// --- the ops ---------------------------------------------------------------------------------------------------------

struct Embed final : Op {
  PackedWeight& table;
  float factor;
  int to;
  Embed(PackedWeight& table, float factor, int to) : Op("embedding"), table(table), factor(factor), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) look_up(step.tokens[r], program.buffers[to].row(r));
    });
  }
  void look_up(int64_t token, float* out) const {
    const int64_t size = step_of(table.type);
    const uint8_t* column = table.data + token / PANEL * table.steps * STEP_BYTES + token % PANEL * 4;
    for (int64_t k = 0; k < table.k; ++k) {
      const uint8_t* from = column + k / size * STEP_BYTES + k % size * bytes_of(table.type);
      if (table.type == Type::int8) {
        out[k] = static_cast<float>(*from - 128) * table.scale[token] * factor;
      } else if (table.type == Type::bf16) {
        uint16_t bits;
        std::memcpy(&bits, from, 2);
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        std::memcpy(&out[k], &wide, 4);
        out[k] *= factor;
      } else {
        std::memcpy(&out[k], from, 4);
        out[k] *= factor;
      }
    }
  }
};

struct Prepare final : Op {
  int source;
  std::vector<float> gain;
  float epsilon;
  int64_t k;
  int to;
  Decomposition rule;
  std::vector<uint8_t> columns;
  bool last;
  int64_t window;               // of the attention whose results are merged
  Prepare* marker = nullptr;    // the op before, which marks the columns that this one takes out
  bool marks = false;

  Prepare(int source, std::vector<float> gain, float epsilon, int64_t k, int to, Decomposition rule, bool last, int64_t window)
      : Op(source < 0 ? "merge" : gain.empty() ? "quantize" : "norm"), source(source), gain(std::move(gain)),
        epsilon(epsilon), k(k), to(to), rule(rule), last(last), window(window) {
    if (rule.extent == Extent::columns && rule.columns) {
      columns.assign(rule.columns, rule.columns + k);
      this->rule.columns = columns.data();
    }
  }

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Kernels& kernels = program.kernels;
    const Prepared& x = program.rows[to].view;
    const int64_t count = last ? step.logit_rows : step.rows;
    phase.run(count, grain_of(count, thread.count), [&](int64_t first, int64_t end) {
      const Decomposition now = marker ? columns_of_all(program.threads(), marker->phase, thread, k) : rule;
      for (int64_t r = first; r < end; ++r) {
        const int64_t from = last ? step.logit_row[r] : r;
        const float* row = source < 0 ? merged(program, from, thread) : program.buffers[source].row(from);
        const float inverse =
            gain.empty() ? 1.0f : 1.0f / std::sqrt(kernels.square_sum(row, k) / static_cast<float>(k) + epsilon);
        kernels.prepare(x, r, row, inverse, or_null(gain), now, thread.row);
        if (marks) mark(x, r, phase, thread);
      }
    });
  }

  const float* merged(Program& program, int64_t row, Thread& thread) const {
    const Program::Tasks& tasks = program.tasks(window);
    const Shape& shape = program.shape;
    const int64_t begin = tasks.part_of_row[row], count = tasks.part_of_row[row + 1] - begin;
    thread.outs.resize(count);
    thread.states.resize(count);
    for (int64_t h = 0; h < shape.heads; ++h) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t place = tasks.parts[begin + i] * shape.heads + h;
        thread.outs[i] = program.partial_out.as<float>() + place * shape.dim;
        thread.states[i] = program.partial_state.as<float>() + place * 2;
      }
      program.kernels.merge(thread.outs.data(), thread.states.data(), count, shape.dim, thread.merged + h * shape.dim);
    }
    return thread.merged;
  }
};

struct Linear final : Op {
  PackedWeight& weight;
  int from, to;
  bool add;
  Activation gate;
  bool last;
  Linear(PackedWeight& weight, int from, int to, bool add, Activation gate, bool last)
      : Op(last ? "head" : "linear"), weight(weight), from(from), to(to), add(add), gate(gate), last(last) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const int64_t count = last ? step.logit_rows : step.rows;
    const Program::Buffer& out = program.buffers[to];
    LinearCall call{};
    call.weight = &weight;
    call.x = &program.rows[from].view;
    call.y = to == 0 ? step.logits : out.memory.as<float>();
    call.y_stride = out.width;
    call.y_columns = to == 0 ? weight.n : out.width;
    call.add = add;
    call.gate = gate;
    multiply_pieces(program.kernels, call, count, phase, thread);
  }
};

struct AddNormed final : Op {
  int source;
  std::vector<float> gain;
  float epsilon;
  int64_t k;
  int to;
  AddNormed(int source, std::vector<float> gain, float epsilon, int64_t k, int to)
      : Op("norm"), source(source), gain(std::move(gain)), epsilon(epsilon), k(k), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const float* x = program.buffers[source].row(r);
        const float inverse = 1.0f / std::sqrt(program.kernels.square_sum(x, k) / static_cast<float>(k) + epsilon);
        program.kernels.scale_row(x, inverse, gain.data(), k, program.buffers[to].row(r), true);
      }
    });
  }
};

struct RotateAndStore final : Op {
  int source;
  int64_t layer;
  int table;
  int64_t rotated;
  std::vector<float> query_gain, key_gain;
  float epsilon, scale;
  RotateAndStore(int source, int64_t layer, int table, int64_t rotated, std::vector<float> query_gain,
                 std::vector<float> key_gain, float epsilon, float scale)
      : Op("rotary"), source(source), layer(layer), table(table), rotated(rotated), query_gain(std::move(query_gain)),
        key_gain(std::move(key_gain)), epsilon(epsilon), scale(scale) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Shape& s = program.shape;
    const Kernels& kernels = program.kernels;
    const int64_t width = bytes_of(s.kv), fields = 2 * s.layers + 1;
    const float* cosines = reinterpret_cast<const float*>(step.tables[2 * table]);
    const float* sines = reinterpret_cast<const float*>(step.tables[2 * table + 1]);
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const float* x = program.buffers[source].row(r);
        const float* cosine = cosines + step.positions[r] * (rotated / 2);
        const float* sine = sines + step.positions[r] * (rotated / 2);
        uint8_t* q = program.queries.as<uint8_t>() + r * s.heads * s.dim * width;
        for (int64_t h = 0; h < s.heads; ++h, x += s.dim)
          kernels.rotate(normed(kernels, x, query_gain, s.dim, thread), cosine, sine, s.dim, rotated, scale,
                         q + h * s.dim * width, s.kv);
        const int64_t* target = step.target + step.place[2 * r] * fields;
        uint8_t* keys = reinterpret_cast<uint8_t*>(target[layer]) + step.place[2 * r + 1] * width;
        uint8_t* values = reinterpret_cast<uint8_t*>(target[s.layers + layer]) + step.place[2 * r + 1] * width;
        const int64_t to_next = target[2 * s.layers] * width;
        for (int64_t h = 0; h < s.kv_heads; ++h) {
          kernels.rotate(normed(kernels, x + h * s.dim, key_gain, s.dim, thread), cosine, sine, s.dim, rotated, 1.0f,
                         keys + h * to_next, s.kv);
          kernels.convert(x + (s.kv_heads + h) * s.dim, s.dim, values + h * to_next, s.kv);
        }
      }
    });
  }
  const float* normed(const Kernels& kernels, const float* x, const std::vector<float>& gain, int64_t dim,
                      Thread& thread) const {
    if (gain.empty()) return x;
    const float inverse = 1.0f / std::sqrt(kernels.square_sum(x, dim) / static_cast<float>(dim) + epsilon);
    kernels.scale_row(x, inverse, gain.data(), dim, thread.row, false);
    return thread.row;
  }
};

struct Attend final : Op {
  int64_t layer, window;
  Attend(int64_t layer, int64_t window) : Op("attention"), layer(layer), window(window) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Shape& s = program.shape;
    const Program::Tasks& tasks = program.tasks(window);
    const int64_t width = bytes_of(s.kv), fields = 2 * s.layers + 1, group = s.heads / s.kv_heads;
    AttentionTask task{};
    task.type = s.kv;
    task.dim = s.dim;
    task.q = program.queries.as<void>();
    task.q_stride = s.heads * s.dim;
    task.position = step.positions;
    task.group = group;
    task.window = window;
    task.out_stride = s.heads * s.dim;
    task.state_stride = s.heads * 2;
    task.scratch = thread.attention;
    phase.run(static_cast<int64_t>(tasks.groups.size()) - 1, 1, [&](int64_t g, int64_t) {
      const auto entry_of = [&](const Program::Task& t, const int64_t* target) {
        return step.item[6 * t.item + 1] + t.head * target[2 * s.layers] + t.first_key * s.dim;
      };
      for (int64_t i = tasks.groups[g]; i < tasks.groups[g + 1]; ++i) {
        const Program::Task& t = tasks.all[i];
        const int64_t* item = step.item + 6 * t.item;
        const int64_t* target = step.target + item[0] * fields;
        const int64_t entry = entry_of(t, target);
        if (i + 1 < tasks.groups[g + 1] && tasks.all[i + 1].keys * s.dim * width <= SHORT) {  // too short to run ahead
          const Program::Task& soon = tasks.all[i + 1];
          const int64_t* there = step.target + step.item[6 * soon.item] * fields;
          const int64_t first = entry_of(soon, there) * width, bytes = soon.keys * s.dim * width;
          for (int64_t b = 0; b < bytes; b += 64) {
            __builtin_prefetch(reinterpret_cast<const uint8_t*>(there[layer]) + first + b);
            __builtin_prefetch(reinterpret_cast<const uint8_t*>(there[s.layers + layer]) + first + b);
          }
        }
        task.tokens = step.item_rows + item[4] + t.first_row;
        task.rows = t.rows;
        task.head = t.head * group;
        task.keys = reinterpret_cast<const uint8_t*>(target[layer]) + entry * width;
        task.values = reinterpret_cast<const uint8_t*>(target[s.layers + layer]) + entry * width;
        task.n = t.keys;
        task.start = item[3] + t.first_key;
        task.out = program.partial_out.as<float>() + (t.partial * s.heads + task.head) * s.dim;
        task.state = program.partial_state.as<float>() + (t.partial * s.heads + task.head) * 2;
        program.kernels.attend(task);
      }
    });
  }
};

struct Argmax final : Op {
  int64_t vocabulary;
  explicit Argmax(int64_t vocabulary) : Op("argmax"), vocabulary(vocabulary) {}

  void run(Program& program, const StepInput& step, Thread&) override {
    if (!step.best) return;
    phase.run(step.logit_rows, 1, [&](int64_t r, int64_t) {
      step.best[r] = program.kernels.argmax(step.logits + r * vocabulary, vocabulary);
    });
  }
};

}  // namespace

// --- weights ---------------------------------------------------------------------------------------------------------

Weight::Weight(const Kernels& kernels, Type type, int64_t n, int64_t k, bool has_bias, int64_t stored, Type stored_type)
    : kernels_(kernels) {
  PackedWeight& w = packed_;
  w.type = type;
  w.n = n;
  w.k = k;
  w.panels = (n + PANEL - 1) / PANEL;
  w.steps = (k + step_of(type) - 1) / step_of(type);
  w.stored = stored;
  w.stored_type = stored_type;
  const int64_t columns = w.panels * PANEL;
  const int64_t data = w.panels * w.steps * STEP_BYTES, scale = type == Type::int8 ? columns * 4 : 0;
  const int64_t bias = has_bias ? columns * 4 : 0, place = stored ? round_up(k * 4, 64) : 0;
  memory_ = SharedMemory(data + scale + bias + place + columns * stored * 2 + 64);
  uint8_t* p = memory_.data();
  const auto part = [&](int64_t bytes) -> void* {
    void* here = bytes ? p : nullptr;
    p += bytes;
    return here;
  };
  w.data = static_cast<uint8_t*>(part(data));
  w.scale = static_cast<float*>(part(scale));
  w.bias = static_cast<float*>(part(bias));
  w.place = static_cast<int32_t*>(part(place));
  w.store = static_cast<uint16_t*>(part(columns * stored * 2));
  if (type == Type::int8) std::memset(w.data, 128, data);  // padding is zero, which is stored as 128
}

void Weight::pack(const void* source, Type type, int64_t rows, int64_t first, int64_t part, int64_t parts, const float* scale) {
  kernels_.pack(packed_, source, type, rows, first, part, parts);
  if (packed_.type == Type::int8)
    for (int64_t r = 0; r < rows; ++r) packed_.scale[packed_row(first + r, part, parts)] = scale[r];
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
    for (int64_t s = 0; s < w.stored; ++s) w.store[(n / PANEL * w.stored + s) * PANEL + n % PANEL] = store[r * w.stored + s];
  }
}

void Weight::multiply(const float* x, int64_t rows, float* y, const Decomposition& rule, bool whole_columns, int threads) {
  const PackedWeight& w = packed_;
  const Kernels& kernels = kernels_;
  std::unique_ptr<Workspace> work;
  {
    std::lock_guard lock(mutex_);  // another thread that multiplies meanwhile makes its own
    work = std::move(idle_);
  }
  if (!work || work->max_rows < rows) work.reset(new Workspace{Rows(w.type, w.k, rows), rows, {}});
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

// --- the program -----------------------------------------------------------------------------------------------------

Program::Program(const Kernels& kernels, Shape shape, int64_t max_rows) : kernels(kernels), shape(shape), max_rows(max_rows) {
  queries = Memory(max_rows * shape.heads * shape.dim * bytes_of(shape.kv));
  largest_k_ = shape.heads * shape.dim;
  buffers.push_back({0, Memory()});
}

int Program::buffer(int64_t width) {
  width = round_up(width, PANEL);
  buffers.push_back({width, Memory(max_rows * width * sizeof(float))});
  return static_cast<int>(buffers.size()) - 1;
}

Rows::Rows(Type type, int64_t k, int64_t max_rows) {
  Prepared& x = view;
  x.type = type;
  x.k = k;
  x.stride = round_up(k, 64 / bytes_of(type));
  const int64_t data = round_up(max_rows * x.stride * bytes_of(type), 64);
  const int64_t each = round_up(max_rows * 4, 64);
  memory = Memory(data + (type == Type::int8 ? 3 * each + 2 * max_rows * k * 4 : 0));
  uint8_t* p = memory.as<uint8_t>();
  x.data = p;
  if (type == Type::int8) {
    x.scale = reinterpret_cast<float*>(p + data);
    x.sum = reinterpret_cast<int32_t*>(p + data + each);
    x.outliers = reinterpret_cast<int32_t*>(p + data + 2 * each);
    x.columns = reinterpret_cast<int32_t*>(p + data + 3 * each);
    x.values = reinterpret_cast<float*>(x.columns + max_rows * k);
  }
}

Thread::Thread(int index, int64_t largest_k, int64_t attention_bytes) : index(index) {
  const int64_t k = round_up(largest_k, 64);
  memory = Memory(k * PANEL * 4 + k * 4 * 4 + 256 + k + attention_bytes);
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
  attention = take(attention_bytes);
  std::fill(index_of, index_of + k, -1);
}

int Program::prepared(Type type, int64_t k) {
  largest_k_ = std::max(largest_k_, k);
  rows.emplace_back(type, k, max_rows);
  return static_cast<int>(rows.size()) - 1;
}

void Program::embed(std::shared_ptr<Weight> table, float factor, int to) {
  ops_.push_back(std::make_unique<Embed>(table->packed(), factor, to));
  weights_.push_back(std::move(table));
}

void Program::prepare(int source, const float* gain, float epsilon, int64_t k, int to, Decomposition rule, bool whole_columns,
                      bool last) {
  const auto add = [&] {
    ops_.push_back(std::make_unique<Prepare>(source, copy(gain, k), epsilon, k, to, rule, last, last_window_));
    return static_cast<Prepare*>(ops_.back().get());
  };
  Prepare* first = add();
  if (!whole_columns) return;
  first->marks = true;
  add()->marker = first;
}

void Program::linear(std::shared_ptr<Weight> weight, int prepared, int to, bool add, Activation gate, bool last) {
  if (to == 0) buffers[0].width = weight->packed().n;
  ops_.push_back(std::make_unique<Linear>(weight->packed(), prepared, to, add, gate, last));
  weights_.push_back(std::move(weight));
}

void Program::add_normed(int source, const float* gain, float epsilon, int64_t k, int to) {
  ops_.push_back(std::make_unique<AddNormed>(source, copy(gain, k), epsilon, k, to));
}

void Program::rotate_and_store(int source, int64_t layer, int table, int64_t rotated, const float* query_gain,
                               const float* key_gain, float epsilon, float scale) {
  ops_.push_back(std::make_unique<RotateAndStore>(source, layer, table, rotated, copy(query_gain, shape.dim),
                                                  copy(key_gain, shape.dim), epsilon, scale));
}

void Program::attend(int64_t layer, int64_t window) {
  ops_.push_back(std::make_unique<Attend>(layer, window));
  last_window_ = window;
  tasks_[window];
}

void Program::argmax(int64_t vocabulary) { ops_.push_back(std::make_unique<Argmax>(vocabulary)); }

// Splits the step's attention into tasks of similar size; the same for all layers with this window.
void Program::plan(const StepInput& step, int64_t window, int threads) {
  Tasks& tasks = tasks_[window];
  tasks.all.clear();
  tasks.groups.assign(1, 0);
  tasks.parts.clear();
  tasks.partials = 0;
  const int64_t group = shape.heads / shape.kv_heads, tile = std::max<int64_t>(1, ATTENTION_ROWS / group);
  struct Tile {
    int64_t item, first, rows, begin, end;
  };
  std::vector<Tile> tiles;
  int64_t total = 0;
  for (int64_t i = 0; i < step.items; ++i) {
    const int64_t* item = step.item + 6 * i;
    const int64_t count = item[5], pieces = (count + tile - 1) / tile;
    for (int64_t p = pieces - 1; p >= 0; --p) {  // of a chunk of a prompt the last rows see the most keys: they go first
      const int64_t first = count * p / pieces, last = count * (p + 1) / pieces;
      int64_t oldest = INT64_MAX, newest = -1;
      for (int64_t r = first; r < last; ++r) {
        const int64_t position = step.positions[step.item_rows[item[4] + r]] - item[3];
        oldest = std::min(oldest, position);
        newest = std::max(newest, position);
      }
      const int64_t end = std::min(newest + 1, item[2]);
      const int64_t begin = window ? std::max<int64_t>(0, oldest + 1 - window) / 32 * 32 : 0;
      if (begin >= end) continue;
      tiles.push_back({i, first, last - first, begin, end});
      total += (last - first) * group * (end - begin) * shape.kv_heads;
    }
  }
  const int64_t share = std::max<int64_t>(1, total / (6 * threads)), enough = total / (12 * threads);
  std::vector<std::pair<int64_t, int64_t>> parts;  // (row, partial result)
  int64_t cost = 0;
  for (const Tile& t : tiles) {
    const int64_t range = std::max(KEYS_OF_A_TASK, round_up(share / (t.rows * group), 256));
    const int64_t pieces = (t.end - t.begin + range - 1) / range;
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t first = t.begin + (t.end - t.begin) * p / pieces / 32 * 32;
      const int64_t last = p + 1 == pieces ? t.end : t.begin + (t.end - t.begin) * (p + 1) / pieces / 32 * 32;
      for (int64_t h = 0; h < shape.kv_heads; ++h) {
        tasks.all.push_back({t.item, t.first, t.rows, h, first, last - first, tasks.partials});
        cost += t.rows * group * (last - first);
        if (cost >= enough) {
          tasks.groups.push_back(static_cast<int64_t>(tasks.all.size()));
          cost = 0;
        }
      }
      const int64_t* item = step.item + 6 * t.item;
      for (int64_t r = 0; r < t.rows; ++r) parts.emplace_back(step.item_rows[item[4] + t.first + r], tasks.partials + r);
      tasks.partials += t.rows;
    }
  }
  if (tasks.groups.back() != static_cast<int64_t>(tasks.all.size())) tasks.groups.push_back(static_cast<int64_t>(tasks.all.size()));
  tasks.part_of_row.assign(step.rows + 1, 0);
  for (const auto& part : parts) ++tasks.part_of_row[part.first + 1];
  for (int64_t r = 0; r < step.rows; ++r) tasks.part_of_row[r + 1] += tasks.part_of_row[r];
  std::vector<int64_t> place(tasks.part_of_row.begin(), tasks.part_of_row.end() - 1);
  tasks.parts.resize(parts.size());
  for (const auto& part : parts) tasks.parts[place[part.first]++] = part.second;
  for (int64_t r = 0; r < step.rows; ++r)
    if (tasks.part_of_row[r] == tasks.part_of_row[r + 1]) throw std::invalid_argument("a row of the step sees no key");
  const size_t out = tasks.partials * shape.heads * shape.dim * sizeof(float), state = tasks.partials * shape.heads * 2 * sizeof(float);
  if (partial_out.bytes() < out) partial_out = Memory(out + out / 4);
  if (partial_state.bytes() < state) partial_state = Memory(state + state / 4);
}

void Program::step(const StepInput& input, int threads) {
  if (running_.test_and_set()) throw std::runtime_error("two threads run the same program at the same time");
  struct Done {
    std::atomic_flag& flag;
    ~Done() { flag.clear(); }
  } done{running_};
  while (static_cast<int>(threads_.size()) < threads)
    threads_.emplace_back(static_cast<int>(threads_.size()), largest_k_, attention_scratch(shape.dim));
  for (auto& [window, tasks] : tasks_) plan(input, window, threads);
  for (auto& op : ops_) op->phase.reset();
  for (Thread& thread : threads_) {
    thread.count = threads;
    thread.marks = nullptr;
  }
  using Clock = std::chrono::steady_clock;
  std::vector<Clock::time_point> times(ops_.size() + 1);
  run_parallel(threads, [&](int index) {
    if (index == 0) times[0] = Clock::now();
    for (size_t i = 0; i < ops_.size(); ++i) {
      ops_[i]->run(*this, input, threads_[index]);
      if (index == 0) times[i + 1] = Clock::now();
    }
  });
  seconds_.clear();
  for (size_t i = 0; i < ops_.size(); ++i)
    seconds_[ops_[i]->kind] += std::chrono::duration<double>(times[i + 1] - times[i]).count();
}

std::map<std::string, double> Program::profile() const { return seconds_; }

int64_t Program::bytes() const {
  int64_t sum = 0;
  for (size_t i = 0; i < weights_.size(); ++i)
    if (std::find(weights_.begin(), weights_.begin() + i, weights_[i]) == weights_.begin() + i) sum += weights_[i]->bytes();
  return sum;
}

}  // namespace gossamer
