// Which slots of one row and KV head go, as `core.select`: the lowest ranked candidates; of equals the later position.
#pragma once

#include "evict_params.cuh"
#include "order.cuh"

namespace d2o {

constexpr int kMinAge = 32;  // as core.select.MIN_AGE

struct VictimsShared {
  SelectShared select;
  int num_sinks, found;
  int unsorted[kMaxVictims];
  int sorted[kMaxVictims];  // ascending slots
};

// What slots of a head are ranked by. Keys are distinct: of equal ranks, the lower slot has the higher key.
struct Ranking {
  const EvictParams* params;
  const float *scores, *rates;
  const int64_t* positions;
  int64_t seen;

  D2O_FN Ranking(const EvictParams& p, const Item& item, const RowWork& work)
      : params(&p),
        scores(head_of<float>(p.scores, item)),
        rates(head_of<float>(p.rates, item)),
        positions(head_of<int64_t>(p.positions, item)),
        seen(work.seen) {}

  D2O_FN float rank(int slot) const {
    switch (params->selection) {
      case kCumulative:
      case kReread: return scores[slot];
      case kWindow: return rates[slot];
      case kRecent: return static_cast<float>(positions[slot]);
      default: {
        const int64_t age = seen - positions[slot];
        return rates[slot] + scores[slot] / static_cast<float>(age < kMinAge ? kMinAge : age);
      }
    }
  }

  D2O_FN uint64_t key(int slot) const {
    return static_cast<uint64_t>(orderable(rank(slot))) << 32 | (0xffffffffu - static_cast<uint32_t>(slot));
  }
};

// Bounds on the keys of candidates: victims are at most `evict`; the tail is above it and at most `tail`.
struct Cuts {
  uint64_t evict, tail;
};

D2O_FN Cuts select_victims(const EvictParams& p, const RowWork& work, const Ranking& ranking, VictimsShared& shared) {
  phase([&](int thread) {
    if (thread == 0) shared.num_sinks = shared.found = 0;
  });
  phase([&](int thread) {
    int count = 0;
    // Positions ascend, so none of the sinks is behind the first `num_sinks` slots.
    for (int i = thread; i < smaller(smaller(p.num_sinks, work.heavy), work.held); i += kThreads) {
      count += ranking.positions[i] < p.num_sinks;
    }
    if (count) atomic_add(&shared.num_sinks, count);
  });
  const int first = shared.num_sinks;
  auto key = [&](int slot) { return ranking.key(slot); };
  Cuts cuts;
  cuts.evict = smallest(shared.select, first, work.end, work.victims, false, key);
  cuts.tail = 0;
  if (p.tail_targets) {
    const int budget = work.kept;
    const int tail = smaller(p.max_tail, larger(1, static_cast<int>(floor(p.tail_fraction * budget + 1e-9))));
    const int some = smaller(work.end - first, work.victims + tail);
    cuts.tail = smallest(shared.select, first, work.end, some, false, key);
  }
  phase([&](int thread) {
    for (int i = first + thread; i < work.end; i += kThreads) {
      if (ranking.key(i) <= cuts.evict) shared.unsorted[atomic_add(&shared.found, 1)] = i;
    }
  });
  phase([&](int thread) {
    for (int e = thread; e < work.victims; e += kThreads) {
      int before = 0;
      for (int other = 0; other < work.victims; ++other) before += shared.unsorted[other] < shared.unsorted[e];
      shared.sorted[before] = shared.unsorted[e];
    }
  });
  return cuts;
}

// Victims among the first slots of a head. sorted: [count] ascending.
D2O_FN int victims_before(const int* sorted, int count, int slot) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (sorted[middle] < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The slot that comes to lie at `place` when the victims are gone.
D2O_FN int source_of(const int* sorted, int count, int place) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (sorted[middle] - middle <= place) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return place + low;
}

}  // namespace d2o
