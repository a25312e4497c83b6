// The threshold of a row and the gate, from the similarities of all KV heads: as `core.threshold`.
#pragma once

#include "evict_nearest.cuh"

namespace d2o {

struct JudgeShared {
  SelectShared select;
  double total[kThreads];
  int count[kThreads];
  float peak[kThreads];
  int merged;
};

// What one row's gate is open to.
struct Gate {
  float threshold;  // after this eviction
  float cut;        // similarities from here on are merged
};

struct Similarities {
  const EvictParams* params;
  int row, victims;

  // The largest of all parts' finds: similarity and slot packed, 0 without a target.
  D2O_FN uint64_t found(int head, int victim) const {
    const int64_t place = (static_cast<int64_t>(row) * params->heads + head) * params->most_victims + victim;
    uint64_t top = 0;
    for (int part = 0; part < params->num_parts; ++part) {
      const uint64_t found = params->nearest[place * params->num_parts + part];
      top = found > top ? found : top;
    }
    return top;
  }

  D2O_FN float at(int head, int victim) const {
    const uint64_t top = found(head, victim);
    return top ? from_orderable(static_cast<uint32_t>(top >> 32)) : -INFINITY;
  }

  // Of the `number`-th of all heads' victims.
  D2O_FN float of(int number) const { return at(number / victims, number % victims); }

  // Over heads, of the victims that have one rank in the order of positions (the released rule). In double, as the sum
  // that the threshold is made of: of one victim a head both are the same mean, and no last bit must close the gate.
  D2O_FN float mean(int victim) const {
    double sum = 0;
    for (int head = 0; head < params->heads; ++head) sum += at(head, victim);
    return static_cast<float>(sum / params->heads);
  }

  D2O_FN bool passes(int head, int victim, const Gate& gate) const {
    if (params->gated) {
      return params->gated[(static_cast<int64_t>(row) * params->heads + head) * params->most_victims + victim];
    }
    if (params->merge == kReleased) return mean(victim) >= gate.threshold;
    const float similarity = at(head, victim);
    return similarity > -INFINITY && similarity >= gate.cut;
  }
};

D2O_FN Gate judge_row(const EvictParams& p, const Similarities& similarities, JudgeShared& shared) {
  const int count = p.heads * similarities.victims;
  phase([&](int thread) {
    double total = 0;
    int finite = 0;
    float peak = -INFINITY;
    for (int n = thread; n < count; n += kThreads) {
      const float found = similarities.of(n);
      if (!(found > -INFINITY && found < INFINITY)) continue;
      total += found;
      finite += 1;
      peak = found > peak ? found : peak;
    }
    shared.total[thread] = total;
    shared.count[thread] = finite;
    shared.peak[thread] = peak;
  });
  // A fixed tree: the same bits every time.
  for (int step = kThreads / 2; step > 0; step /= 2) {
    phase([&](int thread) {
      if (thread >= step) return;
      shared.total[thread] += shared.total[thread + step];
      shared.count[thread] += shared.count[thread + step];
      const float other = shared.peak[thread + step];
      shared.peak[thread] = other > shared.peak[thread] ? other : shared.peak[thread];
    });
  }
  const float old = p.threshold_before ? p.threshold_before[similarities.row] : NAN;
  const int finite = shared.count[0];
  const float mean = static_cast<float>(shared.total[0] / larger(finite, 1));
  const float latest = p.threshold_by_max ? shared.peak[0] : mean;
  Gate gate;
  gate.threshold = finite == 0 ? old : old != old ? mean : p.ema_beta * latest + p.ema_rest * old;
  gate.cut = gate.threshold;
  if (p.by_quantile) {
    const int dropped = static_cast<int>(floor(p.drop_quantile * count + 1e-9));
    const uint64_t bound = smallest(shared.select, 0, count, smaller(dropped, count - 1) + 1, true, [&](int n) {
      return static_cast<uint64_t>(orderable(similarities.of(n))) << 32;
    });
    gate.cut = from_orderable(static_cast<uint32_t>(bound >> 32));
  }
  return gate;
}

}  // namespace d2o
