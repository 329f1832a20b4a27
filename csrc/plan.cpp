// How the attention of a step is divided among threads.
#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "program.h"

namespace gossamer {

namespace {

constexpr int64_t KEYS_OF_A_TASK = 512;  // at least, where the keys of a few rows are split among threads

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

}  // namespace gossamer
