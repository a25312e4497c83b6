// Closing the gaps that victims leave, in place and in order of position.
//
// Every block fills its own part of the kept slots. Slots move to lower places only, so a block that works upwards in
// tiles, each read before it is written, never overwrites what it still needs. What it needs from the next part was
// saved before any block began to write: the halo, at most as many slots as there are victims.
#pragma once

#include "evict_select.cuh"

namespace d2o {

constexpr int kWords = 4;  // of keys, and of values, that a thread holds at once

// Sixteen bytes at a time: of a row, and of what lies between two slots.
D2O_FN int words_of(const EvictParams& p) { return p.head_dim * p.item_size / 16; }

D2O_FN Wide* words_at(const EvictParams& p, const Strided& x, const Item& item, int slot) {
  const int64_t element = item.row * x.row + item.head * x.head + slot * x.slot;
  return reinterpret_cast<Wide*>(static_cast<char*>(x.data) + element * p.item_size);
}

struct HaloRange {
  int begin, end;  // places whose new content lies behind `end` before the move
  int64_t first;   // of the halo's rows

  D2O_FN HaloRange(const EvictParams& p, const Item& item, const Range& range, const int* sorted, int count)
      : end(range.end) {
    begin = range.end - smaller(victims_before(sorted, count, range.end), range.end - range.begin);
    first = (static_cast<int64_t>(item.lead) * p.num_parts + item.part) * halo_size(p);
  }
};

// Rows of `words` words, copied by all threads of a phase: row `to(n)` becomes row `from(n)`, for n < count.
template <class From, class To>
D2O_FN void copy_rows(int thread, int count, int words, From from, To to) {
  for (int n = thread; n < count * words; n += kThreads) to(n / words)[n % words] = from(n / words)[n % words];
}

D2O_FN void save_halo(const EvictParams& p, const Item& item, const HaloRange& halo, const int* sorted, int count) {
  const int words = words_of(p);
  auto row_of = [&](const Strided& x, int n) {
    return words_at(p, x, item, source_of(sorted, count, halo.begin + n));
  };
  phase([&](int thread) {
    const int size = halo.end - halo.begin;
    copy_rows(thread, size, words, [&](int n) { return row_of(p.keys, n); },
              [&](int n) { return reinterpret_cast<Wide*>(p.halo_keys) + (halo.first + n) * words; });
    copy_rows(thread, size, words, [&](int n) { return row_of(p.values, n); },
              [&](int n) { return reinterpret_cast<Wide*>(p.halo_values) + (halo.first + n) * words; });
    for (int n = thread; n < size; n += kThreads) {
      const int slot = source_of(sorted, count, halo.begin + n);
      p.halo_positions[halo.first + n] = head_of<int64_t>(p.positions, item)[slot];
      p.halo_statistics[3 * (halo.first + n)] = head_of<float>(p.scores, item)[slot];
      p.halo_statistics[3 * (halo.first + n) + 1] = head_of<float>(p.rates, item)[slot];
      p.halo_statistics[3 * (halo.first + n) + 2] = head_of<float>(p.log_mass, item)[slot];
    }
  });
}

// Victims' rows are overwritten by other blocks: the parts of a head share the work of saving them.
D2O_FN void save_victims(const EvictParams& p, const Item& item, const int* sorted, int count) {
  const int words = words_of(p);
  const int64_t first = static_cast<int64_t>(item.lead) * p.most_victims;
  const int mine = count > item.part ? ceil_div(count - item.part, p.num_parts) : 0;
  auto number = [&](int n) { return item.part + n * p.num_parts; };
  auto row_of = [&](const Strided& x, int n) { return words_at(p, x, item, sorted[number(n)]); };
  phase([&](int thread) {
    for (int n = thread; n < mine; n += kThreads) {
      p.victims[first + number(n)] = sorted[number(n)];
      p.victim_rates[first + number(n)] = head_of<float>(p.rates, item)[sorted[number(n)]];
    }
    if (p.merge == kNone) return;
    copy_rows(thread, mine, words, [&](int n) { return row_of(p.keys, n); },
              [&](int n) { return reinterpret_cast<Wide*>(p.victim_keys) + (first + number(n)) * words; });
    copy_rows(thread, mine, words, [&](int n) { return row_of(p.values, n); },
              [&](int n) { return reinterpret_cast<Wide*>(p.victim_values) + (first + number(n)) * words; });
  });
}

D2O_FN void move_rows(const EvictParams& p, const Item& item, const Range& range, const HaloRange& halo,
                      const int* sorted, int count) {
  const int words = words_of(p);
  // Before the first victim nothing moves.
  const int begin = larger(range.begin, smaller(sorted[0], halo.begin));
  // Words, not rows, are shared out, so that any row length fills the threads; a row may lie in two tiles. A word is
  // read before any later tile writes its place, since a tile writes no place above those that it reads.
  const int total = (halo.begin - begin) * words;
  for (int tile = 0; tile < total; tile += kThreads * kWords) {
    PerThread<Wide, kWords> key, value;
    phase([&](int thread) {
      for (int i = 0; i < kWords; ++i) {
        const int n = tile + i * kThreads + thread;
        if (n >= total) continue;
        const int slot = source_of(sorted, count, begin + n / words);
        key[thread][i] = words_at(p, p.keys, item, slot)[n % words];
        value[thread][i] = words_at(p, p.values, item, slot)[n % words];
      }
    });
    phase([&](int thread) {
      for (int i = 0; i < kWords; ++i) {
        const int n = tile + i * kThreads + thread;
        if (n >= total) continue;
        const int place = begin + n / words;
        words_at(p, p.keys, item, place)[n % words] = key[thread][i];
        words_at(p, p.values, item, place)[n % words] = value[thread][i];
      }
    });
  }
  phase([&](int thread) {
    const int size = halo.end - halo.begin;
    copy_rows(thread, size, words,
              [&](int n) { return reinterpret_cast<Wide*>(p.halo_keys) + (halo.first + n) * words; },
              [&](int n) { return words_at(p, p.keys, item, halo.begin + n); });
    copy_rows(thread, size, words,
              [&](int n) { return reinterpret_cast<Wide*>(p.halo_values) + (halo.first + n) * words; },
              [&](int n) { return words_at(p, p.values, item, halo.begin + n); });
  });
}

D2O_FN void move_statistics(const EvictParams& p, const Item& item, const Range& range, const HaloRange& halo,
                            const int* sorted, int count) {
  int64_t* positions = head_of<int64_t>(p.positions, item);
  float *scores = head_of<float>(p.scores, item), *rates = head_of<float>(p.rates, item);
  float* log_mass = head_of<float>(p.log_mass, item);
  const int begin = larger(range.begin, smaller(sorted[0], halo.begin));
  for (int tile = begin; tile < halo.begin; tile += kThreads) {
    PerThread<int64_t, 1> position;
    PerThread<float, 3> statistic;
    phase([&](int thread) {
      if (tile + thread >= halo.begin) return;
      const int slot = source_of(sorted, count, tile + thread);
      position[thread][0] = positions[slot];
      statistic[thread][0] = scores[slot];
      statistic[thread][1] = rates[slot];
      statistic[thread][2] = log_mass[slot];
    });
    phase([&](int thread) {
      if (tile + thread >= halo.begin) return;
      positions[tile + thread] = position[thread][0];
      scores[tile + thread] = statistic[thread][0];
      rates[tile + thread] = statistic[thread][1];
      log_mass[tile + thread] = statistic[thread][2];
    });
  }
  phase([&](int thread) {
    for (int n = thread; n < halo.end - halo.begin; n += kThreads) {
      positions[halo.begin + n] = p.halo_positions[halo.first + n];
      scores[halo.begin + n] = p.halo_statistics[3 * (halo.first + n)];
      rates[halo.begin + n] = p.halo_statistics[3 * (halo.first + n) + 1];
      log_mass[halo.begin + n] = p.halo_statistics[3 * (halo.first + n) + 2];
    }
  });
}

// Slots that no token holds any more.
D2O_FN void clear_freed(const EvictParams& p, const Item& item, const RowWork& work) {
  phase([&](int thread) {
    for (int slot = work.kept + thread; slot < work.held; slot += kThreads) {
      head_of<int64_t>(p.positions, item)[slot] = -1;
      head_of<float>(p.scores, item)[slot] = 0.0f;
      head_of<float>(p.rates, item)[slot] = 0.0f;
      head_of<float>(p.log_mass, item)[slot] = 0.0f;
    }
  });
}

}  // namespace d2o
