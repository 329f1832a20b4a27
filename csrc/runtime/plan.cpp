// The division of a step's attention among threads.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "program.h"

namespace gossamer {

namespace {

constexpr int64_t KEYS_OF_A_TASK = 512;  // at least, where the keys of a few rows are split among threads
constexpr int64_t CHEAPER_BY = 4;        // a task within a tolerance, about

// Adds tasks that are like one another but for the head, and puts those together that make up a piece of work.
class Adder {
 public:
  Adder(Program::Tasks& tasks, int64_t kv_heads, int64_t group, int64_t enough)
      : tasks_(tasks), kv_heads_(kv_heads), group_(group), enough_(enough) {}

  void add(Program::Task task, int64_t range, int64_t cheaper_by = 1) {
    task.partial = tasks_.partials;
    for (task.head = 0; task.head < kv_heads_; ++task.head) {
      tasks_.all.push_back(task);
      cost_ += task.rows * group_ * task.keys / cheaper_by;
      if (cost_ < enough_) continue;
      tasks_.groups.push_back(static_cast<int64_t>(tasks_.all.size()));
      cost_ = 0;
    }
    tasks_.partials += task.rows;
    tasks_.range_of.insert(tasks_.range_of.end(), task.rows, range);
  }

 private:
  Program::Tasks& tasks_;
  int64_t kv_heads_, group_, enough_, cost_ = 0;
};

struct Item {
  int64_t keys, start, first_row, rows;
  Item(const StepInput& step, int64_t index)
      : keys(step.item[ITEM * index + 3]), start(step.item[ITEM * index + 4]), first_row(step.item[ITEM * index + 5]),
        rows(step.item[ITEM * index + 6]) {}
};

// Calls use(first, rows, oldest, newest) for the rows of an item, a task's number at a time; the last ones first, which of
// a chunk of a prompt see the most keys. Positions are from the item's first key on.
template <class Use>
void each_tile(const StepInput& step, const Item& item, int64_t tile, const Use& use) {
  const int64_t pieces = (item.rows + tile - 1) / tile;
  for (int64_t p = pieces - 1; p >= 0; --p) {
    const int64_t first = item.rows * p / pieces, last = item.rows * (p + 1) / pieces;
    int64_t oldest = INT64_MAX, newest = -1;
    for (int64_t r = first; r < last; ++r) {
      const int64_t position = step.positions[step.item_rows[item.first_row + r]] - item.start;
      oldest = std::min(oldest, position);
      newest = std::max(newest, position);
    }
    use(first, last - first, oldest, newest);
  }
}

}  // namespace

// Splits the step's attention into tasks; the same for all layers with this window and so many heads of keys.
void Program::plan(const StepInput& step, int64_t window, int64_t kv_heads, int threads, Tasks& tasks) {
  tasks.all.clear();
  tasks.sources.clear();
  tasks.groups.assign(1, 0);
  tasks.range_of.clear();
  tasks.partials = 0;
  if (shape.invariant) divide_invariantly(step, window, kv_heads, threads, tasks);
  else divide(step, window, kv_heads, threads, tasks);
  if (tasks.groups.back() != static_cast<int64_t>(tasks.all.size())) tasks.groups.push_back(static_cast<int64_t>(tasks.all.size()));
  // Items come in the order of their keys, and so do the tasks of each.
  tasks.part_of_row.assign(step.rows + 1, 0);
  const auto each_part = [&](const auto& use) {
    for (const Task& task : tasks.all) {
      if (task.head) continue;
      const int32_t* rows = step.item_rows + Item(step, task.item).first_row + task.first_row;
      for (int64_t r = 0; r < task.rows; ++r) use(rows[r], task.partial + r);
    }
  };
  each_part([&](int64_t row, int64_t) { ++tasks.part_of_row[row + 1]; });
  for (int64_t r = 0; r < step.rows; ++r) tasks.part_of_row[r + 1] += tasks.part_of_row[r];
  std::vector<int64_t> place(tasks.part_of_row.begin(), tasks.part_of_row.end() - 1);
  tasks.parts.resize(tasks.partials);
  each_part([&](int64_t row, int64_t part) { tasks.parts[place[row]++] = part; });
  for (int64_t r = 0; r < step.rows; ++r)
    if (tasks.part_of_row[r] == tasks.part_of_row[r + 1]) throw std::invalid_argument("a row of the step sees no key");
  const size_t out = tasks.partials * shape.heads * shape.widest() * sizeof(float), state = tasks.partials * shape.heads * 2 * sizeof(float);
  if (partial_out.bytes() < out) partial_out = Memory(out + out / 4);
  if (partial_state.bytes() < state) partial_state = Memory(state + state / 4);
}

// Into tasks of similar size.
void Program::divide(const StepInput& step, int64_t window, int64_t kv_heads, int threads, Tasks& tasks) const {
  const int64_t group = shape.heads / kv_heads, tile = std::max<int64_t>(1, ATTENTION_ROWS / group);
  struct Tile {
    int64_t item, first, rows, begin, end;
  };
  std::vector<Tile> tiles;
  int64_t total = 0;
  for (int64_t i = 0; i < step.items; ++i) {
    const Item item(step, i);
    each_tile(step, item, tile, [&](int64_t first, int64_t rows, int64_t oldest, int64_t newest) {
      const int64_t end = std::min(newest + 1, item.keys);
      const int64_t begin = window ? std::max<int64_t>(0, oldest + 1 - window) / 32 * 32 : 0;
      if (begin >= end) return;
      tiles.push_back({i, first, rows, begin, end});
      total += rows * group * (end - begin) * kv_heads;
    });
  }
  const int64_t share = std::max<int64_t>(1, total / (6 * threads));
  Adder adder(tasks, kv_heads, group, total / (12 * threads));
  for (const Tile& t : tiles) {
    const bool whole = step.has_means(t.item, window);  // a row's shares are of all keys of the item
    const int64_t range = whole ? t.end - t.begin : std::max(KEYS_OF_A_TASK, round_up(share / (t.rows * group), 256));
    const int64_t pieces = (t.end - t.begin + range - 1) / range;
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t first = t.begin + (t.end - t.begin) * p / pieces / 32 * 32;
      const int64_t last = p + 1 == pieces ? t.end : t.begin + (t.end - t.begin) * (p + 1) / pieces / 32 * 32;
      adder.add({.item = t.item, .first_row = t.first, .rows = t.rows, .first_key = first, .keys = last - first}, 0,
                whole ? CHEAPER_BY : 1);
    }
  }
}

// Into tasks whose keys begin and end at positions that depend on nothing else in the step.
//
// Floating-point sums depend on their order, so the keys of a row are always taken in the same blocks of INVARIANT_KEYS,
// counted from position 0; blocks are joined one after the other to ranges, and the ranges are merged. Where a block
// begins in one item and ends in another, because a shared prefix ends in it, the rows of the latter gather it. Only the
// blocks at the beginning of a range that stand in one item are joined by their task; the others when the row is merged.
void Program::divide_invariantly(const StepInput& step, int64_t window, int64_t kv_heads, int threads, Tasks& tasks) const {
  constexpr int64_t BLOCK = INVARIANT_KEYS, RANGE = 8 * BLOCK;
  const int64_t group = shape.heads / kv_heads, tile = std::max<int64_t>(1, ATTENTION_ROWS / group);
  std::vector<std::vector<int64_t>> path(step.rows);  // the items that each row attends to
  int64_t total = 0;
  for (int64_t i = 0; i < step.items; ++i) {
    const Item item(step, i);
    for (int64_t r = 0; r < item.rows; ++r) path[step.item_rows[item.first_row + r]].push_back(i);
    total += item.rows * group * item.keys * kv_heads;
  }
  Adder adder(tasks, kv_heads, group, total / (12 * threads));
  for (int64_t i = 0; i < step.items; ++i) {
    const Item item(step, i);
    const std::vector<int64_t>& items = path[step.item_rows[item.first_row]];  // the same for all of its rows, down to here
    const bool last = items.back() == i;
    const int64_t item_end = item.start + item.keys;
    const int64_t end = last ? item_end : item_end / BLOCK * BLOCK;  // the next item goes on in the block that is cut off
    for (int64_t block = item.start / BLOCK * BLOCK; block < end;) {
      const int64_t range = block / RANGE;
      const bool cut = block < item.start, chain = !cut && block % RANGE == 0;
      const int64_t stop = std::min(chain ? block + RANGE : block + BLOCK, end);
      const int64_t first_source = static_cast<int64_t>(tasks.sources.size());
      for (const int64_t each : items) {
        if (!cut || each > i) break;
        const Item from(step, each);
        const int64_t begin = std::max(block, from.start), until = std::min(stop, from.start + from.keys);
        if (begin < until) tasks.sources.push_back({each, begin - from.start, until - begin});
      }
      const int64_t sources = static_cast<int64_t>(tasks.sources.size()) - first_source;
      each_tile(step, item, tile, [&](int64_t first, int64_t rows, int64_t oldest, int64_t newest) {
        const bool seen = item.start + newest >= block && (!window || stop > item.start + oldest + 1 - window);
        if (!seen) return;
        adder.add({.item = i,
                   .first_row = first,
                   .rows = rows,
                   .first_key = block - item.start,
                   .keys = std::min(stop, item.start + newest + 1) - block,
                   .first_source = first_source,
                   .sources = sources},
                  range);
      });
      block = stop;
    }
  }
}

void Program::make_room(const StepInput& step, int threads) {
  int64_t most = 0;
  for (int64_t s = 0; s < step.summaries; ++s) most = std::max(most, means_scratch(shape.widest(), step.summary[s].blocks));
  means_.resize(std::max<size_t>(means_.size(), threads));
  for (Memory& memory : means_)
    if (memory.bytes() < static_cast<size_t>(most)) memory = Memory(most);
  const auto full = shape.layers.empty() ? tasks_.end() : tasks_.find({0, shape.layers[0].kv_heads, false});
  const bool reports = step.summaries && full != tasks_.end();
  reports_.assign(reports ? shape.layers.size() * full->second.all.size() * MEANS_REPORT : 0, 0.0);
}

// In the order of the tasks, whichever thread did them: the sums are always the same.
void Program::report(const StepInput& step) const {
  if (reports_.empty()) return;
  const int64_t layers = static_cast<int64_t>(shape.layers.size()), kv_heads = shape.layers[0].kv_heads;
  const std::vector<Task>& tasks = this->tasks(0, shape.layers[0], false).all;
  for (int64_t layer = 0; layer < layers; ++layer)
    for (size_t t = 0; t < tasks.size(); ++t) {
      if (!step.has_means(tasks[t].item, 0)) continue;
      const double* from = reports_.data() + (layer * tasks.size() + t) * MEANS_REPORT;
      double* to = step.report + ((step.within[tasks[t].item] * layers + layer) * kv_heads + tasks[t].head) * MEANS_REPORT;
      for (int64_t i = 0; i < MEANS_REPORT; ++i) to[i] += from[i];
    }
}

}  // namespace gossamer
