// A step for the rows alone whose logits are wanted.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "program.h"

namespace gossamer {

// What layers need that store nothing: no other row will ever see what they compute for the rest.
class WantedStep {
 public:
  const StepInput& input() const { return input_; }

  void take(const StepInput& whole) {
    const int64_t count = whole.logit_rows;
    std::vector<int32_t> last(whole.rows, -1), before(count, -1);  // of the wanted ones that are this row
    positions_.resize(count);
    for (int64_t w = 0; w < count; ++w) {
      const int64_t row = whole.logit_row[w];
      positions_[w] = whole.positions[row];
      before[w] = last[row];
      last[row] = static_cast<int32_t>(w);
    }
    items_.clear();
    item_rows_.clear();
    for (int64_t i = 0; i < whole.items; ++i) {
      const int64_t* item = whole.item + ITEM * i;
      const int64_t first = static_cast<int64_t>(item_rows_.size());
      for (int64_t r = item[ITEM - 2]; r < item[ITEM - 2] + item[ITEM - 1]; ++r)
        for (int32_t w = last[whole.item_rows[r]]; w >= 0; w = before[w]) item_rows_.push_back(w);
      const int64_t rows = static_cast<int64_t>(item_rows_.size()) - first;
      if (!rows) continue;
      items_.insert(items_.end(), item, item + ITEM - 2);
      items_.insert(items_.end(), {first, rows});
    }
    logit_rows_.resize(count);
    std::iota(logit_rows_.begin(), logit_rows_.end(), 0);
    input_ = whole;
    input_.rows = count;
    input_.items = static_cast<int64_t>(items_.size()) / ITEM;
    input_.tokens = nullptr;
    input_.place = nullptr;
    input_.positions = positions_.data();
    input_.item = items_.data();
    input_.item_rows = item_rows_.data();
    input_.logit_row = logit_rows_.data();
    input_.attend_exactly();
  }

 private:
  StepInput input_;
  std::vector<int64_t> positions_, items_, logit_rows_;
  std::vector<int32_t> item_rows_;
};

}  // namespace gossamer
