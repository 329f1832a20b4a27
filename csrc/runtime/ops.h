// The ops that a program is made of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "program.h"
#include "workspace.h"

namespace gossamer {

struct Embed final : Op {
  PackedWeight& table;
  float factor;
  int to;
  Embed(PackedWeight& table, float factor, int to) : Op("embedding"), table(table), factor(factor), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        program.kernels.of(table.format).look_up(table, step.tokens[r], factor, program.buffers[to].row(r));
    });
  }
};

// Adds what a table has for each row's position.
struct EmbedPositions final : Op {
  PackedWeight& table;
  int to;
  EmbedPositions(PackedWeight& table, int to) : Op("embedding"), table(table), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        program.kernels.of(table.format).look_up(table, step.positions[r], 1.0f, thread.row);
        program.kernels.scale_row(thread.row, 1.0f, nullptr, table.k, program.buffers[to].row(r), true);
      }
    });
  }
};

struct LayerNorm final : Op {
  int source;
  std::vector<float> gain, bias;
  float epsilon;
  int to;
  LayerNorm(int source, std::vector<float> gain, std::vector<float> bias, float epsilon, int to)
      : Op("norm"), source(source), gain(std::move(gain)), bias(std::move(bias)), epsilon(epsilon), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        program.kernels.layer_norm(program.buffers[source].row(r), gain.data(), bias.empty() ? nullptr : bias.data(), epsilon,
                                   static_cast<int64_t>(gain.size()), program.buffers[to].row(r));
    });
  }
};

struct Activate final : Op {
  int buffer;
  int64_t k;
  Activation by;
  Activate(int buffer, int64_t k, Activation by) : Op("activation"), buffer(buffer), k(k), by(by) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) program.kernels.activate(program.buffers[buffer].row(r), k, by);
    });
  }
};

// The first k columns of a buffer, activated, times the next k, in the place of the first; of sorted rows for experts.
struct Glu final : Op {
  int buffer;
  int64_t k;
  Activation by;
  bool sorted;
  Glu(int buffer, int64_t k, Activation by, bool sorted) : Op("activation"), buffer(buffer), k(k), by(by), sorted(sorted) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const int64_t count = sorted ? static_cast<int64_t>(program.routing.token.size()) : step.rows;
    phase.run(count, grain_of(count, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        float* x = program.buffers[buffer].row(r);
        program.kernels.gated(x, x + k, k, by);
      }
    });
  }
};

inline const float* or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

struct Prepare final : Op {
  int source;
  std::vector<float> gain;
  float epsilon, factor;        // the one with a gain, the other without
  int64_t k;
  std::vector<int64_t> order;   // of the entries; empty: as they are
  int to;
  Decomposition rule;
  std::vector<uint8_t> columns;
  Rows which;
  int64_t window;               // of the attention whose results are merged, in a layer
  LayerShape of;                // of this shape
  std::vector<float> sinks, nothing;  // of attention: the states (heads, 2) of the sinks and what they add, zeros (D)
  Prepare* marker = nullptr;    // the op before, which marks the columns that this one takes out
  bool marks = false;

  Prepare(int source, std::vector<float> gain, float number, int64_t k, std::vector<int64_t> order, int to, Decomposition rule,
          Rows which, int64_t window, LayerShape of)
      : Op(source == ATTENTION ? "merge" : gain.empty() ? "quantize" : "norm"), source(source), gain(std::move(gain)),
        epsilon(number), factor(number), k(k), order(std::move(order)), to(to), rule(rule), which(which), window(window), of(of) {
    if (!this->order.empty() && !this->gain.empty()) {
      const std::vector<float> own = this->gain;
      for (int64_t i = 0; i < k; ++i) this->gain[i] = own[this->order[i]];
    }
    if (rule.extent == Extent::columns && rule.columns) {
      columns.assign(rule.columns, rule.columns + k);
      this->rule.columns = columns.data();
    }
  }

  void take_sinks(const std::vector<float>& scores) {
    for (const float score : scores) sinks.insert(sinks.end(), {score, 1.0f});
    if (!scores.empty()) nothing.assign(of.dim, 0.0f);
  }

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Kernels& kernels = program.kernels;
    const Prepared& x = program.rows[to].view;
    const bool sorted = which == Rows::gathered || which == Rows::chosen;
    const int64_t count = sorted                   ? static_cast<int64_t>(program.routing.token.size())
                          : which == Rows::wanted ? step.logit_rows
                                                   : step.rows;
    phase.run(count, grain_of(count, thread.count), [&](int64_t first, int64_t end) {
      const Decomposition now = marker ? columns_of_all(program.threads(), marker->phase, thread, k) : rule;
      for (int64_t r = first; r < end; ++r) {
        const int64_t from = which == Rows::wanted     ? step.logit_row[r]
                             : which == Rows::gathered ? program.routing.token[r]
                                                       : r;
        const float* row = read(program, from, thread);
        const float inverse =
            gain.empty() ? factor : 1.0f / std::sqrt(kernels.square_sum(row, k) / static_cast<float>(k) + epsilon);
        if (!order.empty()) {
          for (int64_t i = 0; i < k; ++i) thread.scratch[i] = row[order[i]];
          row = thread.scratch;
        }
        kernels.prepare(x, r, row, inverse, or_null(gain), now, thread.row);
        if (marks) mark(x, r, phase, thread);
      }
    });
  }

  const float* read(Program& program, int64_t row, Thread& thread) const {
    if (source == ATTENTION) return merged(program, row, thread);
    if (source >= 0) return program.buffers[source].row(row);
    const Prepared& ready = program.rows[READY - source].view;
    return static_cast<const float*>(ready.data) + row * ready.stride;
  }

  const float* merged(Program& program, int64_t row, Thread& thread) const {
    const Program::Tasks& tasks = program.tasks(window, of, wanted);
    const Shape& shape = program.shape;
    const int64_t begin = tasks.part_of_row[row], count = tasks.part_of_row[row + 1] - begin;
    thread.outs.resize(count + 1);
    thread.states.resize(count + 1);
    for (int64_t h = 0; h < shape.heads; ++h) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t place = tasks.parts[begin + i] * shape.heads + h;
        thread.outs[i] = program.partial_out.as<float>() + place * of.dim;
        thread.states[i] = program.partial_state.as<float>() + place * 2;
      }
      int64_t joined = shape.invariant ? join_ranges(program, tasks, begin, count, thread) : count;
      if (!sinks.empty()) {
        thread.outs[joined] = const_cast<float*>(nothing.data());
        thread.states[joined++] = const_cast<float*>(sinks.data() + 2 * h);
      }
      program.kernels.merge(thread.outs.data(), thread.states.data(), joined, of.dim, thread.merged + h * of.dim);
    }
    return thread.merged;
  }

  // Joins the thread's results of each range into the first of them; how many ranges there are.
  int64_t join_ranges(Program& program, const Program::Tasks& tasks, int64_t begin, int64_t count, Thread& thread) const {
    int64_t ranges = 0, before = -1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t range = tasks.range_of[tasks.parts[begin + i]];
      if (range == before) {
        program.kernels.join(thread.outs[ranges - 1], thread.states[ranges - 1], thread.outs[i], thread.states[i], of.dim);
        continue;
      }
      thread.outs[ranges] = thread.outs[i];
      thread.states[ranges++] = thread.states[i];
      before = range;
    }
    return ranges;
  }
};

struct Linear final : Op {
  PackedWeight& weight;
  int from, to;
  bool add;
  Activation gate;
  bool last;
  int addend;  // a buffer, or -1
  Linear(PackedWeight& weight, int from, int to, bool add, Activation gate, bool last, int addend)
      : Op(last ? "head" : "linear"), weight(weight), from(from), to(to), add(add), gate(gate), last(last), addend(addend) {}

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
    if (addend >= 0 && step.runs) {
      call.addend = program.buffers[addend].row(0);
      call.addend_stride = program.buffers[addend].width;
    }
    multiply_pieces(program.kernels, call, count, phase, thread);
  }
};

// See Program::route. One thread does it: it takes less time than to divide it.
struct Route final : Op {
  int source;
  int64_t experts, chosen;
  bool renormalize;
  float margin;
  std::vector<float> preference, factors;
  Route(int source, int64_t experts, int64_t chosen, bool renormalize, float margin, std::vector<float> preference,
        std::vector<float> factors)
      : Op("router"), source(source), experts(experts), chosen(chosen), renormalize(renormalize), margin(margin),
        preference(std::move(preference)), factors(std::move(factors)) {}

  void run(Program& program, const StepInput& step, Thread&) override {
    phase.run(1, 1, [&](int64_t, int64_t) { choose(program, step.rows); });
  }

  void choose(Program& program, int64_t rows) const {
    Routing& r = program.routing;
    std::vector<int64_t> best(rows * chosen), count(experts + 1);
    r.share.resize(rows * chosen);
    for (int64_t t = 0; t < rows; ++t) {
      const float* logits = program.buffers[source].row(t);
      if (margin > 0) choose_apart(logits, best.data() + t * chosen, r.share.data() + t * chosen);
      else choose_for(logits, best.data() + t * chosen, r.share.data() + t * chosen);
    }
    if (!factors.empty())
      for (int64_t i = 0; i < rows * chosen; ++i) r.share[i] *= factors[best[i]];
    for (const int64_t e : best) ++count[e + 1];
    r.expert.clear();
    r.first.clear();
    for (int64_t e = 0; e < experts; ++e) {
      if (count[e + 1]) {
        r.expert.push_back(e);
        r.first.push_back(count[e]);
      }
      count[e + 1] += count[e];
    }
    r.first.push_back(rows * chosen);
    r.chosen_in_all += static_cast<int64_t>(r.expert.size());
    r.token.resize(rows * chosen);
    r.place.resize(rows * chosen);
    for (int64_t i = 0; i < rows * chosen; ++i) {
      r.place[i] = count[best[i]]++;
      r.token[r.place[i]] = i / chosen;
    }
  }

  // The experts of a row, ascending, and their shares. Logits that are not numbers give shares that are none either.
  void choose_for(const float* logits, int64_t* best, float* share) const {
    float largest = logits[0], sum = 0, taken = 0;
    for (int64_t e = 1; e < experts; ++e) largest = std::max(largest, logits[e]);
    for (int64_t e = 0; e < experts; ++e) sum += std::exp(logits[e] - largest);
    const auto rank = [&](int64_t e) {
      return preference.empty() ? logits[e] : std::exp(logits[e] - largest) / sum + preference[e];
    };
    for (int64_t j = 0; j < chosen; ++j) {
      int64_t found = -1;
      for (int64_t e = 0; e < experts; ++e)
        if (std::find(best, best + j, e) == best + j && (found < 0 || rank(e) > rank(found))) found = e;
      best[j] = found;
    }
    std::sort(best, best + chosen);
    for (int64_t j = 0; j < chosen; ++j) taken += share[j] = std::exp(logits[best[j]] - largest) / sum;
    if (renormalize)
      for (int64_t j = 0; j < chosen; ++j) share[j] /= taken;
  }

  // As in Phi-3.5-MoE (arXiv 2409.12136): the share of each is among those not chosen before it whose logits are close.
  void choose_apart(const float* logits, int64_t* best, float* share) const {
    std::vector<std::pair<int64_t, float>> found;
    for (int64_t j = 0; j < chosen; ++j) {
      const auto left = [&](int64_t e) { return std::find(best, best + j, e) == best + j; };
      int64_t first = -1;
      for (int64_t e = 0; e < experts; ++e)
        if (left(e) && (first < 0 || logits[e] > logits[first])) first = e;
      float sum = 0;
      for (int64_t e = 0; e < experts; ++e) {
        const float behind = logits[first] - logits[e];
        if (left(e) && behind / std::max(std::abs(logits[e]), logits[first]) <= margin) sum += std::exp(-behind);
      }
      best[j] = first;
      found.emplace_back(first, 1 / sum);
    }
    std::sort(found.begin(), found.end());
    for (int64_t j = 0; j < chosen; ++j) std::tie(best[j], share[j]) = found[j];
  }
};

// See Program::experts.
struct Experts final : Op {
  std::vector<PackedWeight*> weights;
  int from, to;
  Activation gate;
  Experts(std::vector<PackedWeight*> weights, int from, int to, Activation gate)
      : Op("experts"), weights(std::move(weights)), from(from), to(to), gate(gate) {}

  void run(Program& program, const StepInput&, Thread& thread) override {
    const Routing& routing = program.routing;
    const Program::Buffer& out = program.buffers[to];
    const int64_t hit = static_cast<int64_t>(routing.expert.size()), panels = weights[0]->panels;
    const int64_t grain = grain_of(hit * panels, thread.count), size = std::min(grain, panels), pieces = (panels + size - 1) / size;
    LinearCall call{};
    call.x = &program.rows[from].view;
    call.y = out.memory.as<float>();
    call.y_stride = call.y_columns = out.width;
    call.gate = gate;
    call.scratch = thread.scratch;
    call.index = thread.index_of;
    call.used = thread.used;
    call.entries = thread.entries;
    phase.run(hit * pieces, 1, [&](int64_t piece, int64_t) {
      const int64_t i = piece / pieces;
      call.weight = weights[routing.expert[i]];
      call.first_panel = piece % pieces * size;
      call.last_panel = std::min(call.first_panel + size, panels);
      multiply_rows(program.kernels, call, routing.first[i], routing.first[i + 1]);
    });
  }
};

struct Combine final : Op {
  int source;
  int64_t width;
  float factor;
  int to;
  Combine(int source, int64_t width, float factor, int to) : Op("combine"), source(source), width(width), factor(factor), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Routing& routing = program.routing;
    const int64_t chosen = static_cast<int64_t>(routing.place.size()) / std::max<int64_t>(step.rows, 1);
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t i = first * chosen; i < last * chosen; ++i)
        program.kernels.scale_row(program.buffers[source].row(routing.place[i]), factor * routing.share[i], nullptr, width,
                                  program.buffers[to].row(i / chosen), true);
    });
  }
};

struct AddGated final : Op {
  int source, gate;
  int64_t width;
  float factor;
  int to;
  AddGated(int source, int gate, int64_t width, float factor, int to)
      : Op("combine"), source(source), gate(gate), width(width), factor(factor), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const float share = factor / (1.0f + std::exp(-program.buffers[gate].row(r)[0]));
        program.kernels.scale_row(program.buffers[source].row(r), share, nullptr, width, program.buffers[to].row(r), true);
      }
    });
  }
};

// A run of rows of one adapter.
struct Run {
  int64_t adapter, first, last;
  Run(const StepInput& step, int64_t index)
      : adapter(step.run[3 * index]), first(step.run[3 * index + 1]), last(step.run[3 * index + 2]) {}
  PackedWeight* of(const std::vector<PackedWeight*>& factors) const { return adapter < 0 ? nullptr : factors[adapter]; }
};

// The first half of what adapters add to a product: x (rows, K) to x down^T (rows, r).
struct LowRankDown final : Op {
  std::vector<PackedWeight*> factors;  // of each adapter (r, K), or null
  int from, to;
  LowRankDown(std::vector<PackedWeight*> factors, int from, int to)
      : Op("adapter"), factors(std::move(factors)), from(from), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const int64_t parts = thread.count == 1 ? 1 : 2 * thread.count;
    phase.run(step.runs * parts, 1, [&](int64_t piece, int64_t) {
      const Run of(step, piece / parts);
      if (PackedWeight* factor = of.of(factors)) {
        const int64_t rows = of.last - of.first, part = piece % parts;
        const Prepared& out = program.rows[to].view;
        LinearCall call{};
        call.weight = factor;
        call.x = &program.rows[from].view;
        call.y = static_cast<float*>(out.data);
        call.y_stride = call.y_columns = out.stride;
        call.last_panel = factor->panels;
        multiply_rows(program.kernels, call, of.first + rows * part / parts, of.first + rows * (part + 1) / parts);
      }
    });
  }
};

// The second half: (rows, r) to (rows, r) up^T (rows, N), and 0 for rows without.
struct LowRankUp final : Op {
  std::vector<PackedWeight*> factors;  // of each adapter (N, r), or null
  int from, to;
  LowRankUp(std::vector<PackedWeight*> factors, int from, int to)
      : Op("adapter"), factors(std::move(factors)), from(from), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Program::Buffer& out = program.buffers[to];
    const int64_t panels = out.width / PANEL, grain = grain_of(panels, thread.count), parts = (panels + grain - 1) / grain;
    phase.run(step.runs * parts, 1, [&](int64_t piece, int64_t) {
      const Run of(step, piece / parts);
      const int64_t first = piece % parts * grain, last = std::min(first + grain, panels);
      if (PackedWeight* factor = of.of(factors)) {
        LinearCall call{};
        call.weight = factor;
        call.x = &program.rows[from].view;
        call.y = out.row(0);
        call.y_stride = call.y_columns = out.width;
        call.first_panel = first;
        call.last_panel = last;
        multiply_rows(program.kernels, call, of.first, of.last);
      } else {
        for (int64_t r = of.first; r < of.last; ++r)
          std::memset(out.row(r) + first * PANEL, 0, (last - first) * PANEL * sizeof(float));
      }
    });
  }
};

struct AddNormed final : Op {
  int source;
  std::vector<float> gain;
  float epsilon;
  int64_t k, groups;
  float factor;
  int to;
  AddNormed(int source, std::vector<float> gain, float epsilon, int64_t k, int64_t groups, float factor, int to)
      : Op("norm"), source(source), gain(std::move(gain)), epsilon(epsilon), k(k), groups(groups), factor(factor), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const float* x = program.buffers[source].row(r);
        float* y = program.buffers[to].row(r);
        for (int64_t g = 0; g < groups; ++g, x += k, y += k) {
          const float inverse = 1.0f / std::sqrt(program.kernels.square_sum(x, k) / static_cast<float>(k) + epsilon);
          program.kernels.scale_row(x, inverse, gain.data(), k, y, true);
          if (factor != 1) program.kernels.scale_row(y, factor, nullptr, k, y, false);
        }
      }
    });
  }
};

struct Multiply final : Op {
  int buffer, by;
  int64_t first, k;
  Multiply(int buffer, int by, int64_t first, int64_t k) : Op("activation"), buffer(buffer), by(by), first(first), k(k) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* x = program.buffers[buffer].row(r);
        program.kernels.scale_row(x, 1.0f, program.buffers[by].row(r) + first, k, x, false);
      }
    });
  }
};

// Rows whose logits are wanted, one after the other.
struct TakeWanted final : Op {
  int source;
  int64_t k;
  int to;
  TakeWanted(int source, int64_t k, int to) : Op("combine"), source(source), k(k), to(to) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.logit_rows, grain_of(step.logit_rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        std::memcpy(program.buffers[to].row(r), program.buffers[source].row(step.logit_row[r]), k * sizeof(float));
    });
  }
};

struct Clear final : Op {
  int buffer;
  explicit Clear(int buffer) : Op("combine"), buffer(buffer) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      const Program::Buffer& x = program.buffers[buffer];
      std::memset(x.row(first), 0, (last - first) * x.width * sizeof(float));
    });
  }
};

struct RotateAndStore final : Op {
  int source;
  int64_t layer;
  bool stores;
  int table;
  int64_t rotated;
  HeadNorms norms;
  float scale;
  int query_table;
  RotateAndStore(int source, int64_t layer, bool stores, int table, int64_t rotated, HeadNorms norms, float scale, int query_table)
      : Op("rotary"), source(source), layer(layer), stores(stores), table(table), rotated(rotated), norms(std::move(norms)),
        scale(scale), query_table(query_table) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Shape& s = program.shape;
    const LayerShape of = s.layers[layer];
    const Kernels& kernels = program.kernels;
    const int64_t dim = of.dim, query_bytes = dim * bytes_of(query_type(s.kv));
    const auto row_of = [&](int which, int64_t r) {
      return reinterpret_cast<const float*>(step.tables[which]) + step.positions[r] * (rotated / 2);
    };
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const float* x = program.buffers[source].row(r);
        const float *cosine = row_of(2 * query_table, r), *sine = row_of(2 * query_table + 1, r);
        uint8_t* q = program.queries.as<uint8_t>() + r * s.heads * query_bytes;
        const float inverse = inverse_of_all(kernels, x, norms.queries, s.heads * dim);
        for (int64_t h = 0; h < s.heads; ++h, x += dim)
          turn(kernels, x, norms.queries, h, inverse, cosine, sine, dim, scale, q + h * query_bytes, query_type(s.kv), thread);
        if (stores) store(program, step, r, x, row_of(2 * table, r), row_of(2 * table + 1, r), thread);
      }
    });
  }

  // The keys of row r, at x, and the values behind them.
  void store(const Program& program, const StepInput& step, int64_t r, const float* x, const float* cosine, const float* sine,
             Thread& thread) const {
    const Shape& s = program.shape;
    const LayerShape of = s.layers[layer];
    const Kernels& kernels = program.kernels;
    const int64_t* place = step.place + 3 * r;
    const int64_t* target = step.target + place[0] * s.fields();
    const int64_t row_bytes = kv_bytes(s.kv, of.dim), layers = static_cast<int64_t>(s.layers.size());
    const float inverse = inverse_of_all(kernels, x, norms.keys, of.kv_heads * of.dim);
    for (int64_t h = 0; h < of.kv_heads; ++h) {
      const float *key = x + h * of.dim, *value = x + (of.kv_heads + h) * of.dim;
      const int64_t at = of.entry(place[1], h, target[2 * layers], place[2]) * row_bytes;
      uint8_t *keys = reinterpret_cast<uint8_t*>(target[layer]) + at, *values = reinterpret_cast<uint8_t*>(target[layers + layer]) + at;
      if (s.kv == Type::int8) {
        turn(kernels, key, norms.keys, h, inverse, cosine, sine, of.dim, 1.0f, thread.merged, Type::f32, thread);
        kernels.quantize(thread.merged, of.dim, keys);
      } else {
        turn(kernels, key, norms.keys, h, inverse, cosine, sine, of.dim, 1.0f, keys, s.kv, thread);
      }
      if (norms.values) {
        const float mean = kernels.square_sum(value, of.dim) / static_cast<float>(of.dim);
        kernels.scale_row(value, 1.0f / std::sqrt(mean + norms.epsilon), nullptr, of.dim, thread.merged, false);
        value = thread.merged;
      }
      if (s.kv == Type::int8) kernels.quantize(value, of.dim, values);
      else kernels.convert(value, of.dim, values, s.kv);
    }
  }

  float inverse_of_all(const Kernels& kernels, const float* x, const std::vector<float>& gain, int64_t size) const {
    if (gain.empty() || !norms.whole) return 1.0f;
    return 1.0f / std::sqrt(kernels.square_sum(x, size) / static_cast<float>(size) + norms.epsilon);
  }

  // Head h, normalized and rotated, in the order of the model; scaled; stored as `type`.
  void turn(const Kernels& kernels, const float* x, const std::vector<float>& gain, int64_t h, float inverse,
            const float* cosine, const float* sine, int64_t dim, float factor, void* out, Type type, Thread& thread) const {
    if (gain.empty()) return kernels.rotate(x, cosine, sine, dim, rotated, factor, out, type);
    if (norms.after) {
      kernels.rotate(x, cosine, sine, dim, rotated, 1.0f, thread.row, Type::f32);
      x = thread.row;
    }
    if (!norms.whole) inverse = 1.0f / std::sqrt(kernels.square_sum(x, dim) / static_cast<float>(dim) + norms.epsilon);
    kernels.scale_row(x, inverse, gain.data() + (norms.whole ? h * dim : 0), dim, thread.row, false);
    kernels.rotate(thread.row, cosine, sine, dim, norms.after ? 0 : rotated, factor, out, type);
  }
};

struct Attend final : Op {
  static constexpr int64_t SHORT = 16384;  // bytes of keys that are fetched while the task before is computed
  int64_t layer, window;
  float cap;
  Attend(int64_t layer, int64_t window, float cap) : Op("attention"), layer(layer), window(window), cap(cap) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Shape& s = program.shape;
    const LayerShape of = s.layers[layer];
    const Program::Tasks& tasks = program.tasks(window, of, wanted);
    const int64_t row_bytes = kv_bytes(s.kv, of.dim), fields = s.fields(), group = s.heads / of.kv_heads;
    const int64_t layers = static_cast<int64_t>(s.layers.size());
    AttentionTask task{};
    task.type = s.kv;
    task.dim = of.dim;
    task.q = program.queries.as<void>();
    task.q_stride = s.heads * of.dim;
    task.position = step.positions;
    task.group = group;
    task.window = window;
    task.cap = cap;
    task.out_stride = s.heads * of.dim;
    task.state_stride = s.heads * 2;
    task.scratch = thread.attention;
    phase.run(static_cast<int64_t>(tasks.groups.size()) - 1, 1, [&](int64_t g, int64_t) {
      const auto first_byte = [&](const Program::Task& t, const int64_t* target) {
        const int64_t* item = step.item + ITEM * t.item;
        return of.entry(item[1], t.head, target[2 * layers], item[2] + t.first_key) * row_bytes;
      };
      for (int64_t i = tasks.groups[g]; i < tasks.groups[g + 1]; ++i) {
        const Program::Task& t = tasks.all[i];
        const int64_t* item = step.item + ITEM * t.item;
        const int64_t* target = step.target + item[0] * fields;
        const int64_t first = first_byte(t, target);
        task.next_keys = task.next_values = nullptr;
        if (i + 1 < tasks.groups[g + 1] && tasks.all[i + 1].keys * row_bytes <= SHORT) {
          const Program::Task& soon = tasks.all[i + 1];
          const int64_t* there = step.target + step.item[ITEM * soon.item] * fields;
          const int64_t next = first_byte(soon, there);
          task.next_keys = reinterpret_cast<const uint8_t*>(there[layer]) + next;
          task.next_values = reinterpret_cast<const uint8_t*>(there[layers + layer]) + next;
        }
        task.tokens = step.item_rows + item[5] + t.first_row;
        task.rows = t.rows;
        task.head = t.head * group;
        task.keys = reinterpret_cast<const uint8_t*>(target[layer]) + first;
        task.values = reinterpret_cast<const uint8_t*>(target[layers + layer]) + first;
        task.n = t.keys;
        task.start = item[4] + t.first_key;
        task.out = program.partial_out.as<float>() + (t.partial * s.heads + task.head) * of.dim;
        task.state = program.partial_state.as<float>() + (t.partial * s.heads + task.head) * 2;
        if (s.invariant) {
          if (t.sources) gather(program, step, t, thread, task);
          attend_invariantly(program, thread, task);
          continue;
        }
        if (cap == 0 && step.has_means(t.item, window)) {
          const Summary& summary = step.summary[step.within[t.item]];
          const int64_t at = layer * of.kv_heads + t.head, blocks = summary.blocks;
          const auto head = [&](int64_t from, int64_t count) { return reinterpret_cast<const uint8_t*>(from) + at * count * row_bytes; };
          const float* control = reinterpret_cast<const float*>(summary.control) + 2 * at;
          if (control[0] > 0) {
            task.keys = head(summary.keys, item[3]);
            task.values = head(summary.values, item[3]);
            const KeyMeans means{head(summary.mean_keys, blocks), head(summary.mean_values, blocks),
                                 reinterpret_cast<const float*>(summary.spread) + at * round_up(blocks, PANEL), blocks,
                                 control[0], control[1], program.means_scratch_of(thread), step.check,
                                 program.report_of(layer, i)};
            program.kernels.attend_within(task, means);
            continue;
          }
        }
        program.kernels.attend(task);
      }
    });
  }

  // The task's keys and values from all over the step.
  void gather(Program& program, const StepInput& step, const Program::Task& t, Thread& thread, AttentionTask& task) const {
    const Shape& s = program.shape;
    const LayerShape of = s.layers[layer];
    const int64_t row_bytes = kv_bytes(s.kv, of.dim), layers = static_cast<int64_t>(s.layers.size());
    uint8_t *keys = thread.gathered, *values = thread.gathered + INVARIANT_KEYS * row_bytes;
    task.keys = keys;
    task.values = values;
    const auto& sources = program.tasks(window, of, wanted).sources;
    for (int64_t i = t.first_source; i < t.first_source + t.sources; ++i) {
      const int64_t* item = step.item + ITEM * sources[i].item;
      const int64_t* target = step.target + item[0] * s.fields();
      const int64_t first = of.entry(item[1], t.head, target[2 * layers], item[2] + sources[i].first_key) * row_bytes;
      const int64_t bytes = sources[i].keys * row_bytes;
      std::memcpy(keys, reinterpret_cast<const uint8_t*>(target[layer]) + first, bytes);
      std::memcpy(values, reinterpret_cast<const uint8_t*>(target[layers + layer]) + first, bytes);
      keys += bytes;
      values += bytes;
    }
  }

  // Block by block, each joined to those before it.
  static void attend_invariantly(Program& program, Thread& thread, AttentionTask task) {
    const int64_t row_bytes = kv_bytes(task.type, task.dim), keys = task.n;
    const AttentionTask whole = task;
    task.invariant = true;
    for (int64_t first = 0; first < keys; first += INVARIANT_KEYS) {
      task.n = std::min(INVARIANT_KEYS, keys - first);
      program.kernels.attend(task);
      if (first)
        for (int64_t r = 0; r < task.rows; ++r)
          for (int64_t g = 0; g < task.group; ++g)
            program.kernels.join(whole.out + r * whole.out_stride + g * task.dim, whole.state + r * whole.state_stride + 2 * g,
                                 task.out + r * task.out_stride + g * task.dim, task.state + r * task.state_stride + 2 * g, task.dim);
      task.start += INVARIANT_KEYS;
      task.keys = static_cast<const uint8_t*>(task.keys) + INVARIANT_KEYS * row_bytes;
      task.values = static_cast<const uint8_t*>(task.values) + INVARIANT_KEYS * row_bytes;
      task.out = thread.block_out;
      task.out_stride = task.group * task.dim;
      task.state = thread.block_state;
      task.state_stride = 2 * task.group;
    }
  }
};

struct CapLogits final : Op {
  int64_t vocabulary;
  float most;
  CapLogits(int64_t vocabulary, float most) : Op("head"), vocabulary(vocabulary), most(most) {}

  void run(Program& program, const StepInput& step, Thread&) override {
    phase.run(step.logit_rows, 1,
              [&](int64_t r, int64_t) { program.kernels.cap(step.logits + r * vocabulary, vocabulary, most); });
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

}  // namespace gossamer
