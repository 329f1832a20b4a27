// A decoder as a list of ops over buffers, recorded once and run for every step in one parallel region.
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"
#include "threads.h"
#include "weight.h"
#include "workspace.h"

namespace gossamer {

// Means that stand for the keys of a source, head by head; (L, H) is (layers, kv_heads), the latter alike in all layers.
struct Summary {
  int64_t keys, values;       // (L, H, keys of the source, D): its keys and values, the near ones next to each other
  int64_t mean_keys, mean_values;  // (L, H, blocks, D)
  int64_t spread;             // (L, H, blocks rounded up to 32)
  int64_t control;            // (L, H, 2): threshold, 0 for exact attention; and gain
  int64_t blocks;
};

// Keys, values and rows of one step. All arrays belong to the caller.
struct StepInput {
  int64_t rows = 0, items = 0, logit_rows = 0;
  const int64_t* tokens = nullptr;      // (rows)
  const int64_t* positions = nullptr;   // (rows)
  const int64_t* place = nullptr;       // (rows, 3): target, slot and token of it where the row's key goes
  const int64_t* target = nullptr;      // (targets, 2 layers + 1): keys and values of each layer, (slots, kv_heads, tokens, D);
                                        // tokens from head to head
  const int64_t* item = nullptr;        // (items, ITEM): target, slot, first token, keys, position of the first key, first
                                        // of item_rows, count
  const int32_t* item_rows = nullptr;   // rows that attend to an item
  const int64_t* logit_row = nullptr;   // (logit_rows)
  const int64_t* tables = nullptr;      // (rope tables, 2): cosines and sines, (positions, rotated / 2)
  float* logits = nullptr;              // (logit_rows, vocabulary)
  int64_t* best = nullptr;              // (logit_rows), or null: the index of the largest logit
  int64_t runs = 0;                     // 0: no row has an adapter
  const int64_t* run = nullptr;         // (runs, 3): an adapter or -1, its first row, and the row behind; together all rows
  int64_t state_runs = 0;               // 0: no layer is recurrent
  const int64_t* state_run = nullptr;   // (state_runs, 6): its first row, the row behind, addresses of the states before (0: the
                                        // text begins) and after; rows that are no drafts, and where the state behind
                                        // those is kept too (0: nowhere). Together all rows
  // Attention within a tolerance; see kernels/attention_within.h.
  const int64_t* within = nullptr;      // (items): which means stand for keys of the item, or -1; null: all is exact
  int64_t summaries = 0;                // of how many sources there are means
  const Summary* summary = nullptr;     // (summaries)
  int64_t check = -1;                   // which token of each task is checked; -1: none
  double* report = nullptr;             // (summaries, layers, kv_heads, MEANS_REPORT), added to

  bool has_means(int64_t item_index, int64_t window) const { return within && within[item_index] >= 0 && !window; }
  void attend_exactly() {
    within = nullptr;
    summaries = 0;
    check = -1;
  }
};

// Keys and values of a layer.
struct LayerShape {
  int64_t kv_heads, dim;

  // Entry of a head's key, or value, of a token.
  int64_t entry(int64_t slot, int64_t head, int64_t tokens, int64_t token) const { return (slot * kv_heads + head) * tokens + token; }
};

struct Shape {
  int64_t heads;
  std::vector<LayerShape> layers;  // of those that have keys and values
  Type kv;
  bool invariant;  // a row's results are the same, to the bit, whatever other rows and items the step has; see plan.cpp

  int64_t fields() const { return 2 * static_cast<int64_t>(layers.size()) + 1; }  // of a target
  int64_t widest() const;                                                         // head
};

// RMSNorms of queries and keys, no gains: none; and of values.
struct HeadNorms {
  std::vector<float> queries, keys;  // (D) for every head, or (heads D)
  bool values;                       // of each head, without gains
  bool whole;                        // all heads together, not each by itself
  bool after;                        // they are rotated, not before
  float epsilon;
};

constexpr int64_t ITEM = 7;  // fields

// Which rows an op takes: all, those that need logits, those of a step sorted by the experts that were chosen for them (a
// token as often as it has experts), or, of a buffer with such rows, all.
enum class Rows : int { all, wanted, gathered, chosen };

// What a router has chosen: rows sorted by expert.
struct Routing {
  std::vector<int64_t> token;        // (T chosen): of each sorted row
  std::vector<int64_t> place;        // (T, chosen): among the sorted rows, in the order of the experts
  std::vector<float> share;          // (T, chosen)
  std::vector<int64_t> expert, first;  // those with rows, and where theirs begin; one more at the end
  int64_t chosen_in_all = 0;           // experts with rows, of all layers of a step
};

constexpr int ATTENTION = -1, READY = -2;  // as the source of rows; see Program::prepare

class Program;
class WantedStep;

struct Op {
  std::string kind;
  Phase phase;
  bool wanted = false;  // it only sees the rows whose logits are wanted; see Program::only_wanted
  explicit Op(std::string name) : kind(std::move(name)) {}
  virtual ~Op() = default;
  virtual void run(Program& program, const StepInput& step, Thread& thread) = 0;
};

class Program {
 public:
  Program(const Kernels& kernels, Shape shape, int64_t max_rows);
  ~Program();

  // Recording. Buffers are (max_rows, width) of fp32; 0 is the logits.
  int buffer(int64_t width, int64_t times);  // (times max_rows, width)
  int prepared(Type type, int64_t k, int64_t times);
  void embed(std::shared_ptr<Weight> table, float factor, int to);
  void embed_positions(std::shared_ptr<Weight> table, int to);
  void layer_norm(int source, const float* gain, const float* bias, float epsilon, int64_t k, int to);
  void activate(int buffer, int64_t k, Activation by);
  void glu(int buffer, int64_t k, Activation by, bool sorted);
  // Makes rows ready for a product: of a buffer (`source`), of attention's results (ATTENTION), or of rows made ready in
  // fp32 (READY - their index), normalized if `gain` is not null (RMSNorm with the epsilon `number`; it is copied),
  // otherwise times `number`; their entries in this order (K; copied too) unless it is null.
  void prepare(int source, const float* gain, float number, int64_t k, const int64_t* order, int to, Decomposition rule,
               bool whole_columns, Rows which);
  // `addend`: a buffer that low_rank() fills, or -1.
  void linear(std::shared_ptr<Weight> weight, int prepared, int to, bool add, Activation gate, bool last, int addend);
  // What adapters add to a product: x down^T up^T for the rows of each, and 0 for others; down (r, K), up (N, r). `x` and
  // `between` are rows made ready in fp32, the latter (rows, at least r rounded up to 32). An adapter that leaves the
  // product as it is has null.
  // Chooses experts for every row by a buffer of logits: the `chosen` largest of `experts`. Their shares are the softmax
  // over all of them, or with `renormalize` over the chosen.
  // `preference` (experts), unless null, is added to the softmax over all where they are chosen, and not to their shares.
  // With a `margin`, unless 0, the share of each is among those not chosen before it whose logits are as close as that,
  // relative to the larger one. `factors` (experts), unless null, are those of the shares.
  void route(int source, int64_t experts, int64_t chosen, bool renormalize, float margin, const float* preference,
             const float* factors);
  // The product of each sorted row with the weight of its expert; `prepared` and `to` hold such rows.
  void experts(std::vector<std::shared_ptr<Weight>> weights, int prepared, int to, Activation gate);
  // Adds to each row of `to` (width) its experts' rows of `source`, each times its share and `factor`.
  void combine(int source, int64_t width, float factor, int to);
  // Adds to each row of `to` (width) that of `source` times the sigmoid of the first entry of `gate`, and `factor`.
  void add_gated(int source, int gate, int64_t width, float factor, int to);
  void low_rank(std::vector<std::shared_ptr<Weight>> down, std::vector<std::shared_ptr<Weight>> up, int x, int between, int to);
  // `to` (groups k) = factor (to + rms_norm(source)), each group of k entries by itself.
  void add_normed(int source, const float* gain, float epsilon, int64_t k, int64_t groups, float factor, int to);
  // The first k columns of a buffer times those of `by` from `first` on.
  void multiply(int buffer, int by, int64_t first, int64_t k);
  void clear(int buffer);
  // `to` gets the rows of `source` whose logits are wanted, and behind only_wanted() these are all that ops see: none of
  // these ops may store anything.
  void take_wanted(int source, int64_t k, int to);
  void only_wanted() { only_wanted_ = true; }
  // The layer's queries, and unless another layer did so, its keys and values behind them.
  void rotate_and_store(int source, int64_t layer, bool stores, int table, int64_t rotated, const float* query_gain,
                        const float* key_gain, bool norm_values, bool whole, bool after, float epsilon, float scale, int query_table);
  // `sinks` (heads), unless null: scores, in base 2, of a key for each head whose value is 0, and which all rows see.
  void attend(int64_t layer, int64_t window, float cap, const float* sinks);
  void cap_logits(int64_t vocabulary, float most);
  void argmax(int64_t vocabulary);
  // Recurrent layers, see state_ops.h; `state`: where a layer's part of a text's state begins. Weights are copied.
  void convolve(int source, int64_t channels, int64_t taps, int64_t factor, int64_t gate, const float* weight, const float* bias,
                bool silu, int64_t state, int to);
  void recurrence(int source, int rates, int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv, const float* rate,
                  const float* bias, const float* skip, int64_t state, int to);
  void norm_gated(int buffer, int gates, int64_t first, int64_t groups, const float* gain, float epsilon, int64_t width,
                  bool gate_first);
  void gate_ready(int ready, int gates, int64_t first, int64_t each);

  void step(const StepInput& input, int threads);

  std::map<std::string, double> profile() const;  // seconds of the last step by kind of op
  int64_t experts_read() const { return routing.chosen_in_all; }  // by the last step, in all layers
  int64_t bytes() const;

  // --- for the ops ---
  struct Buffer {
    int64_t width;
    Memory memory;
    float* row(int64_t r) const { return memory.as<float>() + r * width; }
  };
  struct Source {
    int64_t item, first_key, keys;
  };
  struct Task {
    int64_t item, first_row, rows, head, first_key, keys, partial;
    int64_t first_source, sources;         // that its keys are gathered from; none: they stand in the item from first_key on
  };
  struct Tasks {
    std::vector<Task> all;
    std::vector<Source> sources;
    std::vector<int64_t> groups;           // tasks [groups[i], groups[i + 1]) are taken together
    std::vector<int64_t> part_of_row;      // row r has the partial results parts[part_of_row[r] ... part_of_row[r + 1])
    std::vector<int64_t> parts;            // in the order of their keys
    std::vector<int64_t> range_of;         // (partials) their results are joined range by range, where the shape is invariant
    int64_t partials = 0;
  };
  // Of attention with a window, in a layer of this shape, of all rows or of those that are wanted.
  const Tasks& tasks(int64_t window, LayerShape of, bool wanted) const { return tasks_.at({window, of.kv_heads, wanted}); }
  const std::vector<Thread>& threads() const { return threads_; }
  double* report_of(int64_t layer, int64_t task) {
    return reports_.data() + (layer * static_cast<int64_t>(tasks(0, shape.layers[layer], false).all.size()) + task) * MEANS_REPORT;
  }
  float* means_scratch_of(const Thread& thread) const { return means_[thread.index].as<float>(); }

  const Kernels& kernels;
  const Shape shape;
  const int64_t max_rows;
  std::vector<Buffer> buffers;
  std::vector<PreparedRows> rows;
  Routing routing;        // of the last router
  Memory queries;         // (max_rows, heads, D) of the type of the keys
  Memory partial_out;     // (partials, heads, D)
  Memory partial_state;   // (partials, heads, 2)

 private:
  using Clock = std::chrono::steady_clock;

  void push(std::unique_ptr<Op> op);
  void plan(const StepInput& step, int64_t window, int64_t kv_heads, int threads, Tasks& tasks);
  void divide(const StepInput& step, int64_t window, int64_t kv_heads, int threads, Tasks& tasks) const;
  void divide_invariantly(const StepInput& step, int64_t window, int64_t kv_heads, int threads, Tasks& tasks) const;
  void make_room(const StepInput& step, int threads);
  void report(const StepInput& step) const;

  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<std::shared_ptr<Weight>> weights_;
  std::map<std::tuple<int64_t, int64_t, bool>, Tasks> tasks_;  // by window, kv_heads, and whether of wanted rows
  std::unique_ptr<WantedStep> wanted_;
  bool only_wanted_ = false;
  std::vector<Thread> threads_;
  std::vector<Memory> means_;     // of each thread
  std::vector<double> reports_;   // of each task with means, layer by layer
  int64_t largest_k_ = 0, vocabulary_ = INT64_MAX, positions_ = INT64_MAX;
  int64_t last_window_ = 0;       // of the attention that was recorded last, as
  LayerShape last_shape_{1, 1};   // these
  std::vector<float> last_sinks_;
  std::vector<Clock::time_point> times_;  // of the last step: its start, then the end of each op
  std::atomic_flag running_ = ATOMIC_FLAG_INIT;
};

}  // namespace gossamer
