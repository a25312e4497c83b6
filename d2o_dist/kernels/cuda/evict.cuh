// One eviction of one layer while decoding, in place: two halves, and between them every block waits for every other.
//
// The first half chooses victims, finds their nearest targets and saves what others will overwrite; it writes to the
// workspace only. The second reads the similarities of all heads, moves what stays, and merges. Where some heads are on
// other ranks the halves are two launches, and what is merged is decided between them.
#pragma once

#include "evict_merge.cuh"

namespace d2o {

struct FindShared {
  VictimsShared victims;
  NearestShared nearest;
};

struct ApplyShared {
  JudgeShared judge;
  MergeShared merge;
};

union EvictShared {
  FindShared find;
  ApplyShared apply;
};

template <class T>
D2O_FN void evict_find(const EvictParams& p, const Item& item, FindShared& shared) {
  const RowWork work(p, item.row);
  if (work.victims == 0) return;
  const Ranking ranking(p, item, work);
  const Cuts cuts = select_victims(p, work, ranking, shared.victims);
  const int* sorted = shared.victims.sorted;
  save_victims(p, item, sorted, work.victims);
  const Range range(p, work.kept, item.part);
  save_halo(p, item, HaloRange(p, item, range, sorted, work.victims), sorted, work.victims);
  if (p.merge != kNone) find_nearest<T>(p, item, work, ranking, cuts, shared.victims, shared.nearest);
}

D2O_FN void report_row(const EvictParams& p, const Item& item, const RowWork& work, float threshold, int merged) {
  phase([&](int thread) {
    if (thread != 0) return;
    const int64_t dropped = static_cast<int64_t>(work.victims) * p.heads - merged;
    p.threshold[item.row] = threshold;
    p.merged[item.row] = (p.merged_before ? p.merged_before[item.row] : 0) + merged;
    p.dropped[item.row] = (p.dropped_before ? p.dropped_before[item.row] : 0) + dropped;
  });
}

template <class T>
D2O_FN void evict_apply(const EvictParams& p, const Item& item, ApplyShared& shared) {
  const RowWork work(p, item.row);
  const bool reports = item.head == 0 && item.part == 0 && !p.gated;
  Gate gate = {p.threshold_before ? p.threshold_before[item.row] : NAN, INFINITY};
  const Similarities similarities = {&p, item.row, work.victims};
  const bool merges = p.merge != kNone && work.victims > 0 && work.kept > 0;
  if (merges && !p.gated) gate = judge_row(p, similarities, shared.judge);
  if (reports) {
    phase([&](int thread) {
      if (thread == 0) shared.judge.merged = 0;
    });
    phase([&](int thread) {
      int count = 0;
      for (int n = thread; merges && n < p.heads * work.victims; n += kThreads) {
        count += similarities.passes(n / work.victims, n % work.victims, gate);
      }
      if (count) atomic_add(&shared.judge.merged, count);
    });
    report_row(p, item, work, gate.threshold, shared.judge.merged);
  }
  if (work.victims == 0) return;
  int* sorted = shared.merge.sorted;
  phase([&](int thread) {
    for (int e = thread; e < work.victims; e += kThreads) {
      sorted[e] = p.victims[static_cast<int64_t>(item.lead) * p.most_victims + e];
    }
  });
  const Range range(p, work.kept, item.part);
  const HaloRange halo(p, item, range, sorted, work.victims);
  move_rows(p, item, range, halo, sorted, work.victims);
  move_statistics(p, item, range, halo, sorted, work.victims);
  if (item.part == p.num_parts - 1) clear_freed(p, item, work);
  if (!merges) return;
  find_members(p, item, work, range, similarities, gate, shared.merge);
  merge_members<T>(p, item, work, shared.merge);
}

}  // namespace d2o
