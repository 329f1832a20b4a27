// Attention within a tolerance: rows attend to the blocks of keys that seem to matter to them, and to the means of the
// others.
//
// A block is BLOCK_KEYS consecutive keys; near keys stand next to each other. With m its mean key and s the mean square of
// what its keys are off m, per dimension, a row q gives it about
//
//     BLOCK_KEYS exp(q.m + |q|^2 s / 2)
//
// of its attention. Rows that are multiplied together attend to a block if their root mean square share of it is above a
// threshold; otherwise the mean key and the mean value stand for it, with 2^gain BLOCK_KEYS times the weight of one key.
#pragma once

#include "attention.h"

namespace GOSSAMER_NS {

constexpr float LN2 = 0.69314718f;

// The blocks that each tile attends to, and the scratch of KeyMeans that says so.
struct Choice {
  int64_t blocks, padded;
  float* score;    // (ATTENTION_ROWS, padded): of each row with each mean, in base 2
  float* share;    // (2, padded)
  uint8_t* taken;  // (ATTENTION_ROWS tiles at most, padded): 1 where a tile attends to a block

  Choice(const KeyMeans& means)
      : blocks(means.blocks), padded((means.blocks + PANEL - 1) / PANEL * PANEL), score(means.scratch),
        share(score + ATTENTION_ROWS * padded), taken(reinterpret_cast<uint8_t*>(share + 2 * padded)) {}

  // Keys beyond the last whole block, and the first block, are always attended to: many models rest on the first tokens
  // (attention sinks, arXiv 2309.17453), and a mean would not show it.
  bool takes(int64_t tile, int64_t block) const { return block == 0 || block == blocks || taken[tile * padded + block]; }

  // The root mean square share of rows [r0, r1) in each block is compared with the threshold.
  template <class Entry>
  void choose(int64_t tile, int64_t r0, int64_t r1, const Entry* q, int64_t dim, const KeyMeans& means) {
    float* sum = share + padded;
    for (int64_t i = 0; i < padded; i += W) store(sum + i, zero());
    for (int64_t r = r0; r < r1; ++r) {
      float norm = 0;
      for (int64_t d = 0; d < dim; ++d) norm += entry_value(q[r * dim + d]) * entry_value(q[r * dim + d]);
      const F half = set1(norm * LN2 / 2);
      F highest = set1(-__builtin_inff()), total = zero();
      for (int64_t i = 0; i < padded; i += W) {
        const F v = fma(load(means.spread + i), half, load(score + r * padded + i));  // padding has none
        store(share + i, v);
        highest = max(v, highest);
      }
      const F peak = set1(reduce_max(highest));
      for (int64_t i = 0; i < padded; i += W) {
        const F v = exp2(sub(load(share + i), peak));
        store(share + i, v);
        total = add(total, v);
      }
      const F inverse = set1(1 / reduce_add(total));
      for (int64_t i = 0; i < padded; i += W) {
        const F v = mul(load(share + i), inverse);
        store(sum + i, fma(v, v, load(sum + i)));
      }
    }
    const float least = means.threshold * means.threshold * static_cast<float>(r1 - r0);
    for (int64_t b = 0; b < padded; ++b) taken[tile * padded + b] = sum[b] > least;
  }

  static float entry_value(float v) { return v; }
  static float entry_value(uint16_t v) { return bf16_value(v); }
};

// Adds products of `shares` (height, 32 per panel) with panels of values to the output of rows [r0, ...).
template <class Dot, class Entry>
inline void add_values(AttentionScratch<Entry>& w, int64_t r0, int height, const float* fade, const int64_t* panels, int64_t count) {
  const int64_t steps = PANEL / Dot::step;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < w.wide; d += PANEL)
      w.template add_values<Dot>(r0, height, i ? nullptr : fade, d,
                                 w.values + (panels[i] * (w.wide / PANEL) + d / PANEL) * steps * STEP_BYTES,
                                 w.shares + i * PANEL, steps, nullptr);
}

template <class Dot, class Entry>
inline void attend_rows_within(const AttentionTask& task, const KeyMeans& means) {
  AttentionScratch<Entry> w(task);
  Choice choice(means);
  const int64_t steps = w.dim / Dot::step, row_bytes = w.dim * sizeof(Entry), stored = kv_bytes(task.type, w.dim);
  const int64_t tiles = (w.rows + TILE - 1) / TILE, room = w.block / PANEL;
  const int64_t value_bytes = w.wide / PANEL * (PANEL / Dot::step) * STEP_BYTES;
  const auto pack_keys_at = [&](const void* rows, int64_t block, int64_t count, int64_t place) {
    const Entry* k = w.entries(task, static_cast<const uint8_t*>(rows) + block * PANEL * stored, count);
    transpose_words(reinterpret_cast<const uint32_t*>(k), row_bytes / 4, count, steps,
                    reinterpret_cast<uint32_t*>(w.keys + place * steps * STEP_BYTES));
  };
  const auto pack_values_at = [&](const void* rows, int64_t block, int64_t count, int64_t place) {
    pack_values<Dot>(w.entries(task, static_cast<const uint8_t*>(rows) + block * PANEL * stored, count), count, w.dim,
                     w.values + place * value_bytes);
  };
  const auto score = [&](int64_t r0, int height, int64_t place, float* to, int64_t stride) {
    for (int pass = 0; pass < PASSES; ++pass)
      tile_of<Dot>(height, w.keys + place * steps * STEP_BYTES + pass * W * 4,
                   reinterpret_cast<const uint8_t*>(w.q + r0 * w.dim), row_bytes, steps, nullptr, to + pass * W, stride);
  };
  const auto first_row = [&](int64_t t) { return w.rows * t / tiles; };
  const auto height_of = [&](int64_t t) { return static_cast<int>(first_row(t + 1) - first_row(t)); };
  const auto keys_of = [](int64_t all, int64_t block) { return all - block * PANEL < PANEL ? all - block * PANEL : PANEL; };

  // what each row has to do with each mean
  for (int64_t block = 0; block * PANEL < choice.blocks; ++block) {
    pack_keys_at(means.keys, block, keys_of(choice.blocks, block), 0);
    for (int64_t t = 0; t < tiles; ++t)
      score(first_row(t), height_of(t), 0, choice.score + first_row(t) * choice.padded + block * PANEL, choice.padded);
  }
  for (int64_t t = 0; t < tiles; ++t) choice.choose(t, first_row(t), first_row(t + 1), w.q, w.dim, means);

  // the means of the others
  const float weight = 5 + means.gain;  // log2(BLOCK_KEYS)
  static_assert(BLOCK_KEYS == PANEL && PANEL == 32, "a block is a panel");
  float fade[8];
  for (int64_t block = 0; block * PANEL < choice.blocks; ++block) {
    const int64_t none = 0;
    pack_values_at(means.values, block, keys_of(choice.blocks, block), 0);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t r0 = first_row(t);
      const int height = height_of(t);
      bool any = false;
      for (int64_t i = 0; i < PANEL; ++i) {
        const int64_t b = block * PANEL + i;
        const bool stands = b < choice.blocks && !choice.takes(t, b);
        any |= stands;
        for (int r = 0; r < height; ++r)
          w.scores[r * w.block + i] = stands ? choice.score[(r0 + r) * choice.padded + b] + weight : -__builtin_inff();
      }
      if (!any) continue;
      for (int r = 0; r < height; ++r)
        fade[r] = w.soften(r0 + r, w.scores + r * w.block, w.shares + r * w.block, 0, PANEL, false);
      add_values<Dot>(w, r0, height, fade, &none, 1);
    }
  }
  float light_peak[ATTENTION_ROWS], light_total[ATTENTION_ROWS];
  std::memcpy(light_peak, w.peak, w.rows * sizeof(float));
  std::memcpy(light_total, w.total, w.rows * sizeof(float));

  // the keys that matter, of as many blocks at a time as there is room for
  const int64_t all = (task.n + PANEL - 1) / PANEL;
  int64_t taken = 0;
  for (int64_t b = 0; b < all;) {
    int64_t found[8], count = 0;
    for (; b < all && count < room; ++b) {
      bool wanted = false;
      for (int64_t t = 0; t < tiles && !wanted; ++t) wanted = choice.takes(t, b);
      if (!wanted) continue;
      pack_keys_at(task.keys, b, keys_of(task.n, b), count);
      pack_values_at(task.values, b, keys_of(task.n, b), count);
      found[count++] = b;
    }
    for (int64_t t = 0; t < tiles && count; ++t) {
      const int64_t r0 = first_row(t);
      const int height = height_of(t);
      int64_t places[8], held = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (!choice.takes(t, found[i])) continue;
        score(r0, height, i, w.scores + held * PANEL, w.block);
        for (int64_t key = keys_of(task.n, found[i]); key < PANEL; ++key)
          for (int r = 0; r < height; ++r) w.scores[r * w.block + held * PANEL + key] = -__builtin_inff();
        places[held++] = i;
        taken += height * keys_of(task.n, found[i]);
      }
      if (!held) continue;
      for (int r = 0; r < height; ++r)
        fade[r] = w.soften(r0 + r, w.scores + r * w.block, w.shares + r * w.block, 0, held * PANEL, false);
      add_values<Dot>(w, r0, height, fade, places, held);
    }
  }
  means.report[0] += static_cast<double>(taken);
  means.report[1] += static_cast<double>(w.rows * task.n);
  w.finish(task);
  if (means.check < 0) return;

  // one token exactly: how far off is it?
  const int64_t token = means.check % task.rows;
  float light[ATTENTION_ROWS];
  for (int64_t g = 0; g < task.group; ++g) {
    const int64_t r = token * task.group + g;
    light[g] = light_total[r] > 0 ? light_total[r] * scalar_exp2(light_peak[r] - w.peak[r]) / w.total[r] : 0;
  }
  AttentionTask one = task;
  one.tokens += token;
  one.rows = 1;
  one.next_keys = one.next_values = nullptr;
  one.out = means.scratch;  // what was chosen is not needed any more
  one.state = one.out + task.group * task.dim;
  attend(one);
  for (int64_t g = 0; g < task.group; ++g) {
    const float *state = task.state + token * task.state_stride + 2 * g, *exact = one.state + 2 * g;
    const float *out = task.out + token * task.out_stride + g * task.dim, *right = one.out + g * task.dim;
    double off = 0;
    for (int64_t d = 0; d < task.dim; ++d) {
      const double difference = out[d] / state[1] - right[d] / exact[1];
      off += difference * difference;
    }
    const double ratio = static_cast<double>(scalar_exp2(state[0] - exact[0])) * state[1] / exact[1];
    means.report[2] += off;
    means.report[3] += __builtin_log(ratio) * __builtin_log(ratio);
    means.report[4] += 1;
    means.report[5] += 1 - ratio * (1 - light[g]);
    means.report[6] += ratio * light[g];
  }
}

inline void attend_within(const AttentionTask& task, const KeyMeans& means) {
#if defined(__AVX512BF16__)
  if (task.type != Type::f32) return attend_rows_within<Bf16Dot, uint16_t>(task, means);
#endif
  attend_rows_within<FloatDot, float>(task, means);
}

}  // namespace GOSSAMER_NS
