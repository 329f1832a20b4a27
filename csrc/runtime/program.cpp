#include "program.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "state_ops.h"
#include "wanted_step.h"

namespace gossamer {

namespace {

template <class T>
std::vector<T> copy(const T* values, int64_t k) {
  return values ? std::vector<T>(values, values + k) : std::vector<T>();
}

}  // namespace

int64_t Shape::widest() const {
  int64_t dim = 0;
  for (const LayerShape& layer : layers) dim = std::max(dim, layer.dim);
  return dim;
}

Program::Program(const Kernels& kernels, Shape of, int64_t max_rows) : kernels(kernels), shape(std::move(of)), max_rows(max_rows) {
  wanted_ = std::make_unique<WantedStep>();
  largest_k_ = shape.heads * shape.widest();
  queries = Memory(max_rows * largest_k_ * bytes_of(query_type(shape.kv)));
  buffers.push_back({0, Memory()});
}

Program::~Program() = default;

void Program::push(std::unique_ptr<Op> op) {
  op->wanted = only_wanted_;
  ops_.push_back(std::move(op));
}

int Program::buffer(int64_t width, int64_t times) {
  width = round_up(width, PANEL);
  buffers.push_back({width, Memory(times * max_rows * width * sizeof(float))});
  return static_cast<int>(buffers.size()) - 1;
}

int Program::prepared(Type type, int64_t k, int64_t times) {
  largest_k_ = std::max(largest_k_, k);
  rows.emplace_back(type, k, times * max_rows);
  return static_cast<int>(rows.size()) - 1;
}

void Program::embed(std::shared_ptr<Weight> table, float factor, int to) {
  vocabulary_ = std::min(vocabulary_, table->packed().n);
  push(std::make_unique<Embed>(table->packed(), factor, to));
  weights_.push_back(std::move(table));
}

void Program::embed_positions(std::shared_ptr<Weight> table, int to) {
  positions_ = table->packed().n;
  push(std::make_unique<EmbedPositions>(table->packed(), to));
  weights_.push_back(std::move(table));
}

void Program::layer_norm(int source, const float* gain, const float* bias, float epsilon, int64_t k, int to) {
  push(std::make_unique<LayerNorm>(source, copy(gain, k), copy(bias, k), epsilon, to));
}

void Program::activate(int buffer, int64_t k, Activation by) { push(std::make_unique<Activate>(buffer, k, by)); }

void Program::glu(int buffer, int64_t k, Activation by, bool sorted) {
  push(std::make_unique<Glu>(buffer, k, by, sorted));
}

void Program::prepare(int source, const float* gain, float number, int64_t k, const int64_t* order, int to, Decomposition rule,
                      bool whole_columns, Rows which) {
  const auto add = [&] {
    push(std::make_unique<Prepare>(source, copy(gain, k), number, k, copy(order, k), to, rule, which, last_window_, last_shape_));
    Prepare* made = static_cast<Prepare*>(ops_.back().get());
    if (source == ATTENTION) made->take_sinks(last_sinks_);
    return made;
  };
  Prepare* first = add();
  if (!whole_columns) return;
  first->marks = true;
  add()->marker = first;
}

void Program::linear(std::shared_ptr<Weight> weight, int prepared, int to, bool add, Activation gate, bool last, int addend) {
  if (to == 0) buffers[0].width = weight->packed().n;
  push(std::make_unique<Linear>(weight->packed(), prepared, to, add, gate, last, addend));
  weights_.push_back(std::move(weight));
}

void Program::route(int source, int64_t experts, int64_t chosen, bool renormalize, float margin, const float* preference,
                    const float* factors) {
  push(
      std::make_unique<Route>(source, experts, chosen, renormalize, margin, copy(preference, experts), copy(factors, experts)));
}

void Program::experts(std::vector<std::shared_ptr<Weight>> weights, int prepared, int to, Activation gate) {
  std::vector<PackedWeight*> packed;
  for (auto& each : weights) {
    packed.push_back(&each->packed());
    weights_.push_back(std::move(each));
  }
  push(std::make_unique<Experts>(std::move(packed), prepared, to, gate));
}

void Program::combine(int source, int64_t width, float factor, int to) {
  push(std::make_unique<Combine>(source, width, factor, to));
}

void Program::add_gated(int source, int gate, int64_t width, float factor, int to) {
  push(std::make_unique<AddGated>(source, gate, width, factor, to));
}

void Program::low_rank(std::vector<std::shared_ptr<Weight>> down, std::vector<std::shared_ptr<Weight>> up, int x, int between,
                       int to) {
  const auto packed = [](const std::vector<std::shared_ptr<Weight>>& weights) {
    std::vector<PackedWeight*> all;
    for (const auto& each : weights) all.push_back(each ? &each->packed() : nullptr);
    return all;
  };
  push(std::make_unique<LowRankDown>(packed(down), x, between));
  push(std::make_unique<LowRankUp>(packed(up), between, to));
  for (auto* weights : {&down, &up})
    for (auto& each : *weights)
      if (each) weights_.push_back(std::move(each));
}

void Program::add_normed(int source, const float* gain, float epsilon, int64_t k, int64_t groups, float factor, int to) {
  push(std::make_unique<AddNormed>(source, copy(gain, k), epsilon, k, groups, factor, to));
}

void Program::multiply(int buffer, int by, int64_t first, int64_t k) {
  push(std::make_unique<Multiply>(buffer, by, first, k));
}

void Program::take_wanted(int source, int64_t k, int to) { push(std::make_unique<TakeWanted>(source, k, to)); }

void Program::clear(int buffer) { push(std::make_unique<Clear>(buffer)); }

void Program::rotate_and_store(int source, int64_t layer, bool stores, int table, int64_t rotated, const float* query_gain,
                               const float* key_gain, bool norm_values, bool whole, bool after, float epsilon, float scale,
                               int query_table) {
  const LayerShape of = shape.layers.at(layer);
  const int64_t queries = of.dim * (whole ? shape.heads : 1), keys = of.dim * (whole ? of.kv_heads : 1);
  HeadNorms norms{copy(query_gain, queries), copy(key_gain, keys), norm_values, whole, after, epsilon};
  push(std::make_unique<RotateAndStore>(source, layer, stores, table, rotated, std::move(norms), scale, query_table));
}

void Program::attend(int64_t layer, int64_t window, float cap, const float* sinks) {
  push(std::make_unique<Attend>(layer, window, cap));
  last_window_ = window;
  last_shape_ = shape.layers.at(layer);
  last_sinks_ = copy(sinks, shape.heads);
  tasks_[{window, last_shape_.kv_heads, only_wanted_}];
}

void Program::cap_logits(int64_t vocabulary, float most) { push(std::make_unique<CapLogits>(vocabulary, most)); }

void Program::convolve(int source, int64_t channels, int64_t taps, int64_t factor, int64_t gate, const float* weight,
                       const float* bias, bool silu, int64_t state, int to) {
  if (taps < 1 || taps > MOST_TAPS) throw std::invalid_argument("a convolution has too many taps");
  push(std::make_unique<Convolve>(source, channels, taps, factor, gate, copy(weight, taps * channels),
                                            copy(bias, channels), silu, state, to));
}

void Program::recurrence(int source, int rates, int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv,
                         const float* rate, const float* bias, const float* skip, int64_t state, int to) {
  push(std::make_unique<Recurrence>(source, rates, key_heads, value_heads, dk, dv, copy(rate, value_heads),
                                              copy(bias, value_heads), copy(skip, value_heads), state, to));
}

void Program::norm_gated(int buffer, int gates, int64_t first, int64_t groups, const float* gain, float epsilon, int64_t width,
                         bool gate_first) {
  push(std::make_unique<NormGated>(buffer, gates, first, groups, copy(gain, width), epsilon, gate_first));
}

void Program::gate_ready(int ready, int gates, int64_t first, int64_t each) {
  push(std::make_unique<GateReady>(ready, gates, first, each));
}

void Program::argmax(int64_t vocabulary) { push(std::make_unique<Argmax>(vocabulary)); }

void Program::step(const StepInput& input, int threads) {
  if (running_.test_and_set()) throw std::runtime_error("two threads run the same program at the same time");
  struct Done {
    std::atomic_flag& flag;
    ~Done() { flag.clear(); }
  } done{running_};
  if (input.rows > max_rows) throw std::invalid_argument("a step has more rows than the program was made for");
  for (int64_t r = 0; r < input.rows; ++r)
    if (input.tokens[r] < 0 || input.tokens[r] >= vocabulary_) throw std::invalid_argument("a token id is outside of the vocabulary");
  for (int64_t r = 0; r < input.rows; ++r)
    if (input.positions[r] < 0 || input.positions[r] >= positions_) throw std::invalid_argument("a position has no embedding");
  while (static_cast<int>(threads_.size()) < threads) {
    threads_.emplace_back(static_cast<int>(threads_.size()), largest_k_, attention_scratch(shape.widest()));
    if (shape.invariant) threads_.back().hold_blocks(shape.kv, shape.widest());
  }
  if (only_wanted_) wanted_->take(input);
  const auto input_of = [&](bool wanted) -> const StepInput& { return wanted ? wanted_->input() : input; };
  for (auto& [of, tasks] : tasks_) plan(input_of(std::get<2>(of)), std::get<0>(of), std::get<1>(of), threads, tasks);
  make_room(input, threads);
  routing.chosen_in_all = 0;
  for (auto& op : ops_) op->phase.reset();
  for (Thread& thread : threads_) {
    thread.count = threads;
    thread.marks = nullptr;
  }
  times_.resize(ops_.size() + 1);
  run_parallel(threads, [&](int index) {
    if (index == 0) times_[0] = Clock::now();
    for (size_t i = 0; i < ops_.size(); ++i) {
      ops_[i]->run(*this, input_of(ops_[i]->wanted), threads_[index]);
      if (index == 0) times_[i + 1] = Clock::now();
    }
  });
  report(input);
}

std::map<std::string, double> Program::profile() const {
  std::map<std::string, double> seconds;
  for (size_t i = 0; i + 1 < times_.size(); ++i)
    seconds[ops_[i]->kind] += std::chrono::duration<double>(times_[i + 1] - times_[i]).count();
  return seconds;
}

int64_t Program::bytes() const {
  int64_t sum = 0;
  for (size_t i = 0; i < weights_.size(); ++i)
    if (std::find(weights_.begin(), weights_.begin() + i, weights_[i]) == weights_.begin() + i) sum += weights_[i]->bytes();
  return sum;
}

}  // namespace gossamer
