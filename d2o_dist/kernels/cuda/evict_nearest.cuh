// The nearest target of each victim within one part of a head's slots: cosines of kVictims victims with tiles of slots,
// products summed in order of the dims, so that equal keys have equal cosines and the lower slot wins.
#pragma once

#include "evict_select.cuh"

namespace d2o {

constexpr int kVictims = 16;  // at a time
constexpr int kEach = 4;      // of them a thread
constexpr int kSlots = kThreads * kEach / kVictims;
constexpr int kDims = 64;
static_assert(kSlots * kEach == kThreads, "four groups of threads share the victims");

struct NearestShared {
  float slots[kSlots][kDims + 1];  // padded, so that threads of a warp read different banks
  float victims[kDims][kVictims];
  float victim_norm[kVictims];
  float best[kSlots][kVictims];
  int where[kSlots][kVictims];
  int list[kThreads];  // targets of a window of slots, ascending
  uint32_t flags[kThreads / 32];
};

// Four numbers of a row; zeros behind its end.
template <class T>
D2O_FN void load_quad(const T* row, int dim, int head_dim, float (&out)[4]) {
  if (dim >= head_dim) return;
  const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(row + dim);
  for (int i = 0; i < 4; ++i) out[i] = to_float(quad.at[i]);
}

// Victims [first, first + kVictims), dims [dim, dim + kDims), turned.
template <class T>
D2O_FN void load_victims(const EvictParams& p, const T* keys, const int* sorted, int count, int first, int dim,
                         int thread, NearestShared& shared) {
  for (int n = thread; n < kVictims * kDims / 4; n += kThreads) {
    const int victim = n / (kDims / 4), quad = n % (kDims / 4) * 4;
    float x[4] = {0, 0, 0, 0};
    if (first + victim < count) load_quad(keys + sorted[first + victim] * p.keys.slot, dim + quad, p.head_dim, x);
    for (int i = 0; i < 4; ++i) shared.victims[quad + i][victim] = x[i];
  }
}

// Into `list`, ascending, the targets among the kThreads slots from `begin` on. Returns how many.
D2O_FN int list_targets(const EvictParams& p, const RowWork& work, const Ranking& ranking, const Cuts& cuts,
                        const VictimsShared& chosen, int begin, int end, NearestShared& shared) {
  phase([&](int thread) {
    if (thread < kThreads / 32) shared.flags[thread] = 0;
  });
  phase([&](int thread) {
    const int slot = begin + thread;
    if (slot >= end) return;
    const bool candidate = slot >= chosen.num_sinks && slot < work.end;
    const uint64_t key = candidate ? ranking.key(slot) : 0;
    bool target = !candidate || key > cuts.evict;  // is kept
    if (p.tail_targets) {
      target = target && candidate && key <= cuts.tail;
    } else if (p.merge == kMass) {
      target = target && slot >= chosen.num_sinks;
    }
    if (target) atomic_or(&shared.flags[thread / 32], 1u << (thread % 32));
  });
  int total = 0;
  for (int word = 0; word < kThreads / 32; ++word) total += count_bits(shared.flags[word]);
  phase([&](int thread) {
    if (!(shared.flags[thread / 32] >> (thread % 32) & 1)) return;
    int place = count_bits(shared.flags[thread / 32] & ((1u << (thread % 32)) - 1));
    for (int word = 0; word < thread / 32; ++word) place += count_bits(shared.flags[word]);
    shared.list[place] = begin + thread;
  });
  return total;
}

// A cosine and its slot as one number, whose maximum is the largest cosine, and of equal ones the lowest slot. 0: none.
D2O_FN uint64_t pack_nearest(float cosine, int slot) {
  return static_cast<uint64_t>(orderable(cosine)) << 32 | (0xffffffffu - static_cast<uint32_t>(slot));
}

template <class T>
D2O_FN void find_nearest(const EvictParams& p, const Item& item, const RowWork& work, const Ranking& ranking,
                         const Cuts& cuts, const VictimsShared& chosen, NearestShared& shared) {
  const T* keys = head_of<T>(p.keys, item);
  const Range range(p, work.held, item.part);
  for (int first = 0; first < work.victims; first += kVictims) {
    PerThread<float, 1> square;
    phase([&](int thread) { square[thread][0] = 0.0f; });
    for (int dim = 0; dim < p.head_dim; dim += kDims) {
      phase([&](int thread) { load_victims(p, keys, chosen.sorted, work.victims, first, dim, thread, shared); });
      phase([&](int thread) {
        if (thread >= kVictims) return;
        for (int d = 0; d < kDims; ++d) {
          square[thread][0] = fmaf(shared.victims[d][thread], shared.victims[d][thread], square[thread][0]);
        }
      });
    }
    PerThread<float, kEach> best;
    PerThread<int, kEach> where;
    phase([&](int thread) {
      if (thread < kVictims) shared.victim_norm[thread] = sqrtf(square[thread][0]);
      for (int i = 0; i < kEach; ++i) best[thread][i] = -INFINITY, where[thread][i] = -1;
    });
    for (int window = range.begin; window < range.end; window += kThreads) {
      const int count = list_targets(p, work, ranking, cuts, chosen, window, range.end, shared);
      for (int tile = 0; tile < count; tile += kSlots) {
        PerThread<float, kEach> dot;
        phase([&](int thread) {
          square[thread][0] = 0.0f;
          for (int i = 0; i < kEach; ++i) dot[thread][i] = 0.0f;
        });
        for (int dim = 0; dim < p.head_dim; dim += kDims) {
          phase([&](int thread) {
            load_victims(p, keys, chosen.sorted, work.victims, first, dim, thread, shared);
            for (int n = thread; n < kSlots * kDims / 4; n += kThreads) {
              const int slot = n / (kDims / 4), quad = n % (kDims / 4) * 4;
              float x[4] = {0, 0, 0, 0};
              if (tile + slot < count) {
                load_quad(keys + shared.list[tile + slot] * p.keys.slot, dim + quad, p.head_dim, x);
              }
              for (int i = 0; i < 4; ++i) shared.slots[slot][quad + i] = x[i];
            }
          });
          phase([&](int thread) {
            const int slot = thread % kSlots, group = thread / kSlots * kEach;
            if (first + group >= work.victims || tile + slot >= count) return;
            for (int d = 0; d < kDims; ++d) {
              const float x = shared.slots[slot][d];
              square[thread][0] = fmaf(x, x, square[thread][0]);
              for (int i = 0; i < kEach; ++i) {
                dot[thread][i] = fmaf(x, shared.victims[d][group + i], dot[thread][i]);
              }
            }
          });
        }
        phase([&](int thread) {
          const int slot = thread % kSlots, group = thread / kSlots * kEach;
          if (tile + slot >= count) return;
          const float norm = sqrtf(square[thread][0]);
          for (int i = 0; i < kEach; ++i) {
            const float norms = norm * shared.victim_norm[group + i];
            const float cosine = norms > 0.0f ? dot[thread][i] / norms : 0.0f;
            if (cosine > best[thread][i]) best[thread][i] = cosine, where[thread][i] = shared.list[tile + slot];
          }
        });
      }
    }
    phase([&](int thread) {
      const int slot = thread % kSlots, group = thread / kSlots * kEach;
      for (int i = 0; i < kEach; ++i) {
        shared.best[slot][group + i] = best[thread][i];
        shared.where[slot][group + i] = where[thread][i];
      }
    });
    phase([&](int thread) {
      if (thread >= kVictims || first + thread >= work.victims) return;
      uint64_t top = 0;
      for (int slot = 0; slot < kSlots; ++slot) {
        if (shared.where[slot][thread] < 0) continue;
        const uint64_t found = pack_nearest(shared.best[slot][thread], shared.where[slot][thread]);
        top = found > top ? found : top;
      }
      const int64_t victim = static_cast<int64_t>(item.lead) * p.most_victims + first + thread;
      p.nearest[victim * p.num_parts + item.part] = top;
    });
  }
}

}  // namespace d2o
