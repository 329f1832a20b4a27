// The ops of recurrent layers. A text's state is one row of numbers, of which each layer has a part of its own.
#pragma once

#include "ops.h"

namespace gossamer {

// Rows of a step that go on from one state.
struct StateRows {
  int64_t first, count;
  const float* before;  // null where a text begins
  float* after;
  int64_t certain;  // rows that are no drafts
  float* kept;      // the state behind those; null if there are no others
  StateRows(const StepInput& step, int64_t index) : StateRows(step.state_run + 6 * index) {}

 private:
  explicit StateRows(const int64_t* run)
      : first(run[0]), count(run[1] - run[0]), before(reinterpret_cast<const float*>(run[2])),
        after(reinterpret_cast<float*>(run[3])), certain(run[4]), kept(reinterpret_cast<float*>(run[5])) {}
};

// Columns [0, channels) of a buffer, times those from `factor` on, to another buffer, times those from `gate` on of the first.
struct Convolve final : Op {
  int source, to;
  int64_t channels, taps, factor, gate, state;  // factor, gate: a column, or -1
  std::vector<float> weight, bias;
  bool silu;
  Convolve(int source, int64_t channels, int64_t taps, int64_t factor, int64_t gate, std::vector<float> weight,
           std::vector<float> bias, bool silu, int64_t state, int to)
      : Op("convolution"), source(source), to(to), channels(channels), taps(taps), factor(factor), gate(gate), state(state),
        weight(std::move(weight)), bias(std::move(bias)), silu(silu) {}

  void run(Program& program, const StepInput& step, Thread&) override {
    const int64_t parts = (channels + CONVOLVED - 1) / CONVOLVED;
    const Program::Buffer &in = program.buffers[source], &out = program.buffers[to];
    phase.run(step.state_runs * parts, 1, [&](int64_t piece, int64_t) {
      const StateRows of(step, piece / parts);
      const int64_t first = piece % parts * CONVOLVED;
      const float* x = in.row(of.first);
      program.kernels.convolve({.rows = of.count, .channels = channels, .taps = taps, .first = first,
                                .last = std::min(first + CONVOLVED, channels), .x = x, .factor = factor < 0 ? nullptr : x + factor,
                                .gate = gate < 0 ? nullptr : x + gate, .x_stride = in.width, .weight = weight.data(),
                                .bias = or_null(bias), .silu = silu, .before = of.before ? of.before + state : nullptr,
                                .after = of.after + state, .certain = of.certain,
                                .kept = of.kept ? of.kept + state : nullptr, .y = out.row(of.first), .y_stride = out.width});
    });
  }
};

// Linear attention with a decay; see RecurrenceCall. Queries, keys and values are columns of a buffer, and logits of the
// rates of each value head those of another one: of the delta rule beta's, sigmoid(logit), and behind them the steps'; of a
// state space the steps', which are its beta too. A decay is exp(-rate step), and a step softplus(logit + bias).
struct Recurrence final : Op {
  int source, rates, to;
  int64_t key_heads, value_heads, dk, dv, state;
  std::vector<float> rate, bias, skip;  // skip: of a state space; empty: the delta rule
  Recurrence(int source, int rates, int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv, std::vector<float> rate,
             std::vector<float> bias, std::vector<float> skip, int64_t state, int to)
      : Op("recurrence"), source(source), rates(rates), to(to), key_heads(key_heads), value_heads(value_heads), dk(dk), dv(dv),
        state(state), rate(std::move(rate)), bias(std::move(bias)), skip(std::move(skip)) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Program::Buffer &in = program.buffers[source], &out = program.buffers[to];
    const bool corrects = skip.empty();
    const int64_t keys = key_heads * dk;
    const int64_t q = corrects ? 0 : value_heads * dv + keys, k = corrects ? keys : value_heads * dv, v = corrects ? 2 * keys : 0;
    phase.run(step.state_runs * value_heads, 1, [&](int64_t piece, int64_t) {
      const StateRows of(step, piece / value_heads);
      const int64_t head = piece % value_heads, key_head = head / (value_heads / key_heads), size = dk * dv;
      thread.rates.resize(2 * of.count);
      for (int64_t r = 0; r < of.count; ++r) {
        const float* logits = program.buffers[rates].row(of.first + r);
        const float x = logits[(corrects ? value_heads : 0) + head] + bias[head], softplus = x > 20 ? x : std::log1p(std::exp(x));
        thread.rates[2 * r] = std::exp(-rate[head] * softplus);
        thread.rates[2 * r + 1] = corrects ? 1.0f / (1.0f + std::exp(-logits[head])) : softplus;
      }
      thread.matrix.resize(recurrence_scratch(dk, dv));
      const float* x = in.row(of.first);
      program.kernels.recur({.corrects = corrects, .skip = corrects ? 0.0f : skip[head], .rows = of.count, .dk = dk, .dv = dv,
                             .q = x + q + key_head * dk, .k = x + k + key_head * dk, .v = x + v + head * dv, .x_stride = in.width,
                             .decay = thread.rates.data(), .beta = thread.rates.data() + 1, .rate_stride = 2,
                             .before = of.before ? of.before + state + head * size : nullptr,
                             .after = of.after + state + head * size, .certain = of.certain,
                             .kept = of.kept ? of.kept + state + head * size : nullptr, .y = out.row(of.first) + head * dv,
                             .y_stride = out.width, .scratch = thread.matrix.data()});
    });
  }
};

// RMSNorm of each of `groups` parts of a buffer's rows, and silu of the gate, which is columns of another buffer: the gate
// comes before the norm (`gate_first`) or behind it.
struct NormGated final : Op {
  int buffer, gates;
  int64_t first, groups;
  std::vector<float> gain;  // of the whole row
  float epsilon;
  bool gate_first;
  NormGated(int buffer, int gates, int64_t first, int64_t groups, std::vector<float> gain, float epsilon, bool gate_first)
      : Op("norm"), buffer(buffer), gates(gates), first(first), groups(groups), gain(std::move(gain)), epsilon(epsilon),
        gate_first(gate_first) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const int64_t dim = static_cast<int64_t>(gain.size()) / groups;
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t g = 0; g < groups; ++g) {
          float* x = program.buffers[buffer].row(r) + g * dim;
          const float* gate = program.buffers[gates].row(r) + first + g * dim;
          if (gate_first) program.kernels.gate_by(x, gate, dim, true);
          const float inverse = 1.0f / std::sqrt(program.kernels.square_sum(x, dim) / static_cast<float>(dim) + epsilon);
          program.kernels.scale_row(x, inverse, gain.data() + g * dim, dim, x, false);
          if (!gate_first) program.kernels.gate_by(x, gate, dim, true);
        }
    });
  }
};

// Rows that were made ready in fp32, times the sigmoid of columns of a buffer, one for `each` entries.
struct GateReady final : Op {
  int ready, gates;
  int64_t first, each;
  GateReady(int ready, int gates, int64_t first, int64_t each)
      : Op("merge"), ready(ready), gates(gates), first(first), each(each) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Prepared& x = program.rows[ready].view;
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* row = static_cast<float*>(x.data) + r * x.stride;
        const float* gate = program.buffers[gates].row(r) + first;
        if (each == 1) program.kernels.gate_by(row, gate, x.k, false);
        for (int64_t i = 0; each > 1 && i < x.k; i += each) {
          const float factor = 1.0f / (1.0f + std::exp(-gate[i / each]));
          program.kernels.scale_row(row + i, factor, nullptr, each, row + i, false);
        }
      }
    });
  }
};

}  // namespace gossamer
