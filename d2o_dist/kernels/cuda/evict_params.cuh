// What an eviction is told, and how its work is cut. Mirrored by `EvictParams` in evict.py, field by field.
//
// B rows, H KV heads, C slots of a buffer, D head dim, E victims a head at most, P parts that each head is cut into.
// Every [D] is a multiple of 16 bytes, and begins at such.
#pragma once

#include "dtypes.cuh"

namespace d2o {

constexpr int kMaxVictims = 1024;

enum Selection { kCumulative, kWindow, kMixed, kRecent, kReread };
enum Halves { kFind = 1, kApply = 2 };
enum Merge { kKeysValues, kValues, kMass, kReleased, kNone };

// [B, H, C] or [B, H, C, D]; strides in elements, the last dim is contiguous.
struct Strided {
  void* data;
  int64_t row, head, slot;
};

struct RowPlan {
  int64_t held, heavy, recent, seen;
};

struct EvictParams {
  Strided keys, values, positions, scores, rates, log_mass;
  const RowPlan* rows;           // [B]
  const float* threshold_before; // [B], or null: no row has evicted
  float* threshold;              // [B], written
  const int64_t *merged_before, *dropped_before;  // [B], or null
  int64_t *merged, *dropped;                      // [B], written
  const uint8_t* gated;  // [B, H, E]: which victims are merged, in order of position; or null: it is decided here
  // Carved out of one allocation by `carve`; see there.
  int* victims;
  char *victim_keys, *victim_values;
  float* victim_rates;
  uint64_t* nearest;
  char *halo_keys, *halo_values;
  int64_t* halo_positions;
  float* halo_statistics;
  double tail_fraction, drop_quantile;
  float ema_beta, ema_rest, max_log_mass, self_weight;
  int32_t batch, heads, head_dim, item_size, dtype;
  int32_t most_held, most_victims, num_parts;
  int32_t selection, merge, tail_targets, max_tail, by_quantile, threshold_by_max, num_sinks;
  int32_t halves;    // kFind, kApply, or both
  int32_t schedule;  // of the host build
};

// One block's share: part `part` of the slots of KV head `head` of row `row`.
struct Item {
  int row, head, lead, part;
};

D2O_FN Item item_of(const EvictParams& p, int number) {
  const int lead = number / p.num_parts;
  return Item{lead / p.heads, lead % p.heads, lead, number % p.num_parts};
}

// A row's numbers. It evicts `victims` slots of each head, of the candidates in [first, end): in order of position the
// sinks come first and the recent ones last.
struct RowWork {
  int held, heavy, victims, kept;
  int64_t seen;
  int end;

  D2O_FN RowWork(const EvictParams& p, int row) {
    const RowPlan plan = p.rows[row];
    held = static_cast<int>(plan.held);
    heavy = static_cast<int>(plan.heavy);
    victims = larger(0, static_cast<int>(plan.held - plan.heavy - plan.recent));
    kept = held - victims;
    seen = plan.seen;
    end = held - static_cast<int>(plan.recent);
  }
};

// [begin, end) of a part of `count` things.
struct Range {
  int begin, end;

  D2O_FN Range(const EvictParams& p, int count, int part) {
    const int size = ceil_div(count, p.num_parts);
    begin = smaller(count, size * part);
    end = smaller(count, begin + size);
  }
};

template <class T>
D2O_FN T* head_of(const Strided& x, const Item& item) {
  return static_cast<T*>(x.data) + item.row * x.row + item.head * x.head;
}

// Most slots of a part whose new content lies in the part behind it.
D2O_FN int halo_size(const EvictParams& p) {
  const int part = ceil_div(p.most_held, p.num_parts);
  return part < p.most_victims ? part : p.most_victims;
}

#ifdef __CUDACC__
#define D2O_HOST_FN __host__ inline
#else
#define D2O_HOST_FN inline
#endif

// Sets the pointers into the workspace that begins at `base`, and returns its size in bytes.
D2O_HOST_FN int64_t carve(EvictParams& p, char* base) {
  const int64_t leads = static_cast<int64_t>(p.batch) * p.heads, rows = leads * p.most_victims;
  const int64_t part = (p.most_held + p.num_parts - 1) / p.num_parts;
  const int64_t halo = leads * p.num_parts * (part < p.most_victims ? part : p.most_victims);
  const int64_t row_bytes = static_cast<int64_t>(p.head_dim) * p.item_size;
  int64_t used = 0;
  auto take = [&](int64_t bytes) {
    char* place = base + used;
    used += (bytes + 255) / 256 * 256;
    return place;
  };
  p.nearest = reinterpret_cast<uint64_t*>(take(8 * rows * p.num_parts));  // [B, H, E, P]
  p.victims = reinterpret_cast<int*>(take(4 * rows));                     // [B, H, E], ascending
  p.victim_keys = take(rows * row_bytes);                                 // [B, H, E, D]
  p.victim_values = take(rows * row_bytes);
  p.victim_rates = reinterpret_cast<float*>(take(4 * rows));
  p.halo_keys = take(halo * row_bytes);  // [B, H, P, halo_size, D]
  p.halo_values = take(halo * row_bytes);
  p.halo_positions = reinterpret_cast<int64_t*>(take(8 * halo));
  p.halo_statistics = reinterpret_cast<float*>(take(4 * 3 * halo));  // [B, H, P, halo_size, 3]
  return used;
}

}  // namespace d2o
