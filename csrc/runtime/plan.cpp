// The division of a step's attention among threads.
#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "program.h"

namespace gossamer {

namespace {

constexpr int64_t KEYS_OF_A_TASK = 512;  // at least, where the keys of a few rows are split among threads
constexpr int64_t CHEAPER_BY = 4;        // a task within a tolerance, about

}  // namespace

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
    const bool whole = step.has_means(t.item, window);  // a row's shares are of all keys of the item
    const int64_t range = whole ? t.end - t.begin : std::max(KEYS_OF_A_TASK, round_up(share / (t.rows * group), 256));
    const int64_t pieces = (t.end - t.begin + range - 1) / range;
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t first = t.begin + (t.end - t.begin) * p / pieces / 32 * 32;
      const int64_t last = p + 1 == pieces ? t.end : t.begin + (t.end - t.begin) * (p + 1) / pieces / 32 * 32;
      for (int64_t h = 0; h < shape.kv_heads; ++h) {
        tasks.all.push_back({t.item, t.first, t.rows, h, first, last - first, tasks.partials});
        cost += t.rows * group * (last - first) / (whole ? CHEAPER_BY : 1);
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

void Program::make_room(const StepInput& step, int threads) {
  int64_t most = 0;
  for (int64_t s = 0; s < step.summaries; ++s) most = std::max(most, means_scratch(shape.dim, step.summary[s].blocks));
  means_.resize(std::max<size_t>(means_.size(), threads));
  for (Memory& memory : means_)
    if (memory.bytes() < static_cast<size_t>(most)) memory = Memory(most);
  const auto full = tasks_.find(0);
  reports_.assign(step.summaries && full != tasks_.end() ? shape.layers * full->second.all.size() * MEANS_REPORT : 0, 0.0);
}

// In the order of the tasks, whichever thread did them: the sums are always the same.
void Program::report(const StepInput& step) const {
  if (reports_.empty()) return;
  const std::vector<Task>& tasks = tasks_.at(0).all;
  for (int64_t layer = 0; layer < shape.layers; ++layer)
    for (size_t t = 0; t < tasks.size(); ++t) {
      if (!step.has_means(tasks[t].item, 0)) continue;
      const double* from = reports_.data() + (layer * tasks.size() + t) * MEANS_REPORT;
      double* to = step.report + ((step.within[tasks[t].item] * shape.layers + layer) * shape.kv_heads + tasks[t].head) * MEANS_REPORT;
      for (int64_t i = 0; i < MEANS_REPORT; ++i) to[i] += from[i];
    }
}

}  // namespace gossamer
