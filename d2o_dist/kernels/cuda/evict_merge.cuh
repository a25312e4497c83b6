// Victims folded into the kept slots of one part, after these have moved: as `core.merge`. Of each target the first
// victim that is merged into it stands for all of them, and they are added in order.
#pragma once

#include "evict_judge.cuh"
#include "evict_move.cuh"

namespace d2o {

constexpr float kTiny = 1.1754943508222875e-38f;

struct MergeShared {
  int sorted[kMaxVictims];
  int target[kMaxVictims];  // place after the move; -1: not merged, or into another part
  float weight[kMaxVictims];
  int leads[kMaxVictims];
};

// Which victims are merged into this part's slots.
D2O_FN void find_members(const EvictParams& p, const Item& item, const RowWork& work, const Range& range,
                         const Similarities& similarities, const Gate& gate, MergeShared& shared) {
  phase([&](int thread) {
    for (int e = thread; e < work.victims; e += kThreads) {
      const uint64_t top = similarities.found(item.head, e);
      shared.target[e] = -1;
      if (!top || !similarities.passes(item.head, e, gate)) continue;
      const int slot = static_cast<int>(0xffffffffu - static_cast<uint32_t>(top));
      const int place = slot - victims_before(shared.sorted, work.victims, slot);
      if (place < range.begin || place >= range.end) continue;
      const float similarity = from_orderable(static_cast<uint32_t>(top >> 32));
      shared.target[e] = place;
      shared.weight[e] = p.merge == kReleased ? similarity
                         : p.merge == kMass   ? p.victim_rates[static_cast<int64_t>(item.lead) * p.most_victims + e]
                                              : expf(similarity);
    }
  });
  phase([&](int thread) {
    for (int e = thread; e < work.victims; e += kThreads) {
      bool leads = shared.target[e] >= 0;
      for (int other = 0; other < e && leads; ++other) leads = shared.target[other] != shared.target[e];
      shared.leads[e] = leads;
    }
  });
}

template <class T>
D2O_FN void merge_members(const EvictParams& p, const Item& item, const RowWork& work, const MergeShared& shared) {
  const bool with_keys = p.merge == kKeysValues || p.merge == kReleased;
  const int64_t first = static_cast<int64_t>(item.lead) * p.most_victims;
  float *rates = head_of<float>(p.rates, item), *log_mass = head_of<float>(p.log_mass, item);
  for (int leader = 0; leader < work.victims; ++leader) {
    if (!shared.leads[leader]) continue;
    const int place = shared.target[leader];
    const float own = p.merge == kMass ? fmaxf(rates[place], kTiny) : p.merge == kReleased ? 1.0f : p.self_weight;
    float share = 0.0f;
    for (int e = leader; e < work.victims; ++e) {
      if (shared.target[e] == place) share += p.merge == kReleased ? 1.0f : shared.weight[e];
    }
    const float total = own + share;
    phase([&](int thread) {
      for (int n = thread; n < (with_keys ? 2 : 1) * p.head_dim; n += kThreads) {
        const bool of_keys = n >= p.head_dim;
        const int dim = of_keys ? n - p.head_dim : n;
        const T* victims = reinterpret_cast<const T*>(of_keys ? p.victim_keys : p.victim_values);
        const Strided& kept = of_keys ? p.keys : p.values;
        float added = 0.0f;
        for (int e = leader; e < work.victims; ++e) {
          if (shared.target[e] != place) continue;
          added = fmaf(shared.weight[e], to_float(victims[(first + e) * p.head_dim + dim]), added);
        }
        T* cell = head_of<T>(kept, item) + place * kept.slot + dim;
        *cell = from_float<T>((own * to_float(*cell) + added) / total);
      }
      if (p.merge == kMass && thread == 0) {
        const float mass = log_mass[place] + logf(total / own);
        log_mass[place] = mass < p.max_log_mass ? mass : p.max_log_mass;
      }
    });
    // `own` was read from here by all threads, before the phase above.
    phase([&](int thread) {
      if (p.merge == kMass && thread == 0) rates[place] = total;
    });
  }
}

}  // namespace d2o
