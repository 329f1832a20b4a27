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
  static constexpr int64_t CHANNELS = 256;  // of a piece
  int source, to;
  int64_t channels, taps, factor, gate, state;  // factor, gate: a column, or -1
  std::vector<float> weight, bias;
  bool silu;
  Convolve(int source, int64_t channels, int64_t taps, int64_t factor, int64_t gate, std::vector<float> weight,
           std::vector<float> bias, bool silu, int64_t state, int to)
      : Op("convolution"), source(source), to(to), channels(channels), taps(taps), factor(factor), gate(gate), state(state),
        weight(std::move(weight)), bias(std::move(bias)), silu(silu) {}

  void run(Program& program, const StepInput& step, Thread&) override {
    const int64_t parts = (channels + CHANNELS - 1) / CHANNELS;
    const Program::Buffer &in = program.buffers[source], &out = program.buffers[to];
    phase.run(step.state_runs * parts, 1, [&](int64_t piece, int64_t) {
      const StateRows of(step, piece / parts);
      const int64_t first = piece % parts * CHANNELS;
      const float* x = in.row(of.first);
      program.kernels.convolve({.rows = of.count, .channels = channels, .taps = taps, .first = first,
                                .last = std::min(first + CHANNELS, channels), .x = x, .factor = factor < 0 ? nullptr : x + factor,
                                .gate = gate < 0 ? nullptr : x + gate, .x_stride = in.width, .weight = weight.data(),
                                .bias = or_null(bias), .silu = silu, .before = of.before ? of.before + state : nullptr,
                                .after = of.after + state, .certain = of.certain,
                                .kept = of.kept ? of.kept + state : nullptr, .y = out.row(of.first), .y_stride = out.width});
    });
  }
};

// Queries, keys and values of a buffer, one after the other, and of another one beta's and the decays' logits of each value
// head: the decay is exp(-rate softplus(logit + bias)).
struct DeltaRule final : Op {
  int source, rates, to;
  int64_t key_heads, value_heads, dk, dv, state;
  std::vector<float> rate, bias;
  DeltaRule(int source, int rates, int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv, std::vector<float> rate,
            std::vector<float> bias, int64_t state, int to)
      : Op("delta rule"), source(source), rates(rates), to(to), key_heads(key_heads), value_heads(value_heads), dk(dk), dv(dv),
        state(state), rate(std::move(rate)), bias(std::move(bias)) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Program::Buffer &in = program.buffers[source], &out = program.buffers[to];
    phase.run(step.state_runs * value_heads, 1, [&](int64_t piece, int64_t) {
      const StateRows of(step, piece / value_heads);
      const int64_t head = piece % value_heads, key_head = head / (value_heads / key_heads), size = dk * dv;
      thread.rates.resize(2 * of.count);
      for (int64_t r = 0; r < of.count; ++r) {
        const float* logits = program.buffers[rates].row(of.first + r);
        const float x = logits[value_heads + head] + bias[head], softplus = x > 20 ? x : std::log1p(std::exp(x));
        thread.rates[2 * r] = std::exp(-rate[head] * softplus);
        thread.rates[2 * r + 1] = 1.0f / (1.0f + std::exp(-logits[head]));
      }
      thread.delta.resize(delta_scratch(dk, dv));
      const float* x = in.row(of.first);
      program.kernels.delta_rule({.rows = of.count, .dk = dk, .dv = dv, .q = x + key_head * dk, .k = x + (key_heads + key_head) * dk,
                                  .v = x + 2 * key_heads * dk + head * dv, .x_stride = in.width, .decay = thread.rates.data(),
                                  .beta = thread.rates.data() + 1, .rate_stride = 2,
                                  .before = of.before ? of.before + state + head * size : nullptr,
                                  .after = of.after + state + head * size, .certain = of.certain,
                                  .kept = of.kept ? of.kept + state + head * size : nullptr, .y = out.row(of.first) + head * dv, .y_stride = out.width,
                                  .scratch = thread.delta.data()});
    });
  }
};

// Each head of a buffer's rows: RMSNorm, times silu of the gate, which is columns of another buffer.
struct NormGated final : Op {
  int buffer, gates;
  int64_t first, heads;
  std::vector<float> gain;
  float epsilon;
  NormGated(int buffer, int gates, int64_t first, int64_t heads, std::vector<float> gain, float epsilon)
      : Op("norm"), buffer(buffer), gates(gates), first(first), heads(heads), gain(std::move(gain)), epsilon(epsilon) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const int64_t dim = static_cast<int64_t>(gain.size());
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t h = 0; h < heads; ++h) {
          float* x = program.buffers[buffer].row(r) + h * dim;
          const float inverse = 1.0f / std::sqrt(program.kernels.square_sum(x, dim) / static_cast<float>(dim) + epsilon);
          program.kernels.scale_row(x, inverse, gain.data(), dim, x, false);
          program.kernels.gate_by(x, program.buffers[gates].row(r) + first + h * dim, dim, true);
        }
    });
  }
};

// Rows that were made ready in fp32, times the sigmoid of columns of a buffer.
struct GateReady final : Op {
  int ready, gates;
  int64_t first;
  GateReady(int ready, int gates, int64_t first) : Op("merge"), ready(ready), gates(gates), first(first) {}

  void run(Program& program, const StepInput& step, Thread& thread) override {
    const Prepared& x = program.rows[ready].view;
    phase.run(step.rows, grain_of(step.rows, thread.count), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        program.kernels.gate_by(static_cast<float*>(x.data) + r * x.stride, program.buffers[gates].row(r) + first, x.k, false);
    });
  }
};

}  // namespace gossamer
