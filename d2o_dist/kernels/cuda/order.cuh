// The count-th smallest of many keys, by digits of eight bits from the top: a pass counts the keys of each digit.
#pragma once

#include "block.cuh"

namespace d2o {

// Floats in order as unsigned integers: -0 and 0 are equal, NaN is the largest.
D2O_FN uint32_t orderable(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = bits_as<uint32_t>(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

D2O_FN float from_orderable(uint32_t key) {
  return bits_as<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct SelectShared {
  int bins[256];
  int groups[16];
  int digit, before, inside;
};

// A bound: exactly `count` of the keys key(i), begin <= i < end, are at most it. Keys must differ, and there must be
// that many. With `exact` keys may be equal: then the top 32 bits of the bound are those of the count-th smallest.
template <class Key>
D2O_FN uint64_t smallest(SelectShared& shared, int begin, int end, int count, bool exact, Key key) {
  uint64_t prefix = 0;
  int wanted = count;
  for (int shift = 56;; shift -= 8) {
    phase([&](int thread) { shared.bins[thread] = 0; });
    phase([&](int thread) {
      for (int i = begin + thread; i < end; i += kThreads) {
        const uint64_t found = key(i);
        // In two shifts: one by 64 would not be defined.
        if ((found >> shift) >> 8 == (prefix >> shift) >> 8) {
          atomic_add(&shared.bins[(found >> shift) & 255], 1);
        }
      }
    });
    phase([&](int thread) {
      if (thread < 16) {
        int sum = 0;
        for (int i = 0; i < 16; ++i) sum += shared.bins[16 * thread + i];
        shared.groups[thread] = sum;
      }
    });
    phase([&](int thread) {
      if (thread == 0) {
        int group = 0, before = 0;
        while (group < 15 && before + shared.groups[group] < wanted) before += shared.groups[group++];
        int digit = 16 * group;
        while (digit < 255 && before + shared.bins[digit] < wanted) before += shared.bins[digit++];
        shared.digit = digit;
        shared.before = before;
        shared.inside = shared.bins[digit];
      }
    });
    prefix |= static_cast<uint64_t>(shared.digit) << shift;
    wanted -= shared.before;
    if (exact ? shift == 32 : (shift == 0 || shared.inside == wanted)) {
      return prefix | ((static_cast<uint64_t>(1) << shift) - 1);
    }
  }
}

}  // namespace d2o
