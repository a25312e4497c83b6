// The two halves of a plain decode step around its attention: the new token's slot, and what the step adds to scores.
#pragma once

#include "evict_params.cuh"

namespace d2o {

// Mirrored by `AppendParams` in append.py.
struct AppendParams {
  Strided keys, values, positions, scores, rates, log_mass;
  Strided new_keys, new_values;  // [B, H, D]: slot strides are not used
  const int64_t* index;          // [B, H]: where the token goes
  const int64_t* seen;           // [B]: its position; null: positions are written already
  int32_t batch, heads, head_dim, capacity, dtype, schedule;
};

// One row and KV head. A row whose index is outside the buffer gets nothing.
template <class T>
D2O_FN void append_head(const AppendParams& p, int lead) {
  const Item item{lead / p.heads, lead % p.heads, lead, 0};
  const int64_t slot = p.index[lead];
  if (slot < 0 || slot >= p.capacity) return;
  phase([&](int thread) {
    for (int d = thread; d < p.head_dim; d += kThreads) {
      head_of<T>(p.keys, item)[slot * p.keys.slot + d] = head_of<T>(p.new_keys, item)[d];
      head_of<T>(p.values, item)[slot * p.values.slot + d] = head_of<T>(p.new_values, item)[d];
    }
    if (thread != 0) return;
    if (p.seen) head_of<int64_t>(p.positions, item)[slot] = p.seen[item.row];
    head_of<float>(p.scores, item)[slot] = 0.0f;
    head_of<float>(p.rates, item)[slot] = 0.0f;
    head_of<float>(p.log_mass, item)[slot] = 0.0f;
  });
}

// Mirrored by `ScoreParams` in update_scores.py.
struct ScoreParams {
  Strided logits, lse;           // [B, Hq, S], [B, Hq]
  Strided scores, rates, probs;  // [B, H, S]; data is null where there is none
  const int64_t* newest;         // [B, H], needed by rates
  const uint8_t* present;        // [B], or null: all
  int32_t batch, heads, group, num_slots, schedule;
  float decay, rest;
};

D2O_FN int score_blocks(const ScoreParams& p) { return ceil_div(p.num_slots, kThreads); }

// kThreads slots of one row and KV head, a thread each.
D2O_FN void update_scores_block(const ScoreParams& p, int number) {
  const int blocks = score_blocks(p), lead = number / blocks;
  const Item item{lead / p.heads, lead % p.heads, lead, 0};
  const bool present = !p.present || p.present[item.row];
  phase([&](int thread) {
    const int64_t slot = static_cast<int64_t>(number % blocks) * kThreads + thread;
    if (slot >= p.num_slots) return;
    float prob = 0.0f;
    for (int member = 0; present && member < p.group; ++member) {
      const int64_t head = static_cast<int64_t>(item.head) * p.group + member;
      const float lse = static_cast<float*>(p.lse.data)[item.row * p.lse.row + head * p.lse.head];
      const float logit =
          static_cast<float*>(p.logits.data)[item.row * p.logits.row + head * p.logits.head + slot * p.logits.slot];
      // No live slot at all: the lse is -inf, and -inf - -inf would be NaN.
      prob += expf(logit - (lse == -INFINITY ? 0.0f : lse));
    }
    if (p.probs.data) head_of<float>(p.probs, item)[slot * p.probs.slot] = prob;
    if (!present) return;
    if (p.scores.data) head_of<float>(p.scores, item)[slot * p.scores.slot] += prob;
    if (p.rates.data) {
      float* rate = &head_of<float>(p.rates, item)[slot * p.rates.slot];
      *rate = p.newest[lead] == slot ? prob : *rate * p.rest + prob * p.decay;
    }
  });
}

}  // namespace d2o
