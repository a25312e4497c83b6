// One block of threads, written once for two compilers. nvcc makes a block of a kernel of it; g++ makes loops over the
// threads, so that the same source is tested where there is no GPU.
//
// A function of a block is a sequence of phases. Inside a phase threads do not wait for each other, and what one writes
// no other may read; before and after each phase all of them meet. Code between phases is the same for every thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define D2O_FN __device__ __forceinline__
#else
#define D2O_FN inline
#endif

namespace d2o {

constexpr int kThreads = 256;

#ifdef __CUDACC__

template <class Body>
D2O_FN void phase(Body body) {
  // The first barrier keeps writes of this phase behind what slower threads still read before it.
  __syncthreads();
  body(static_cast<int>(threadIdx.x));
  __syncthreads();
}

// N values that belong to one thread and outlive a phase: registers.
template <class T, int N>
struct PerThread {
  T own[N];
  D2O_FN T (&operator[](int))[N] { return own; }
};

// Integers only: their sums do not depend on the order. Returns the old value.
D2O_FN int atomic_add(int* place, int value) { return atomicAdd(place, value); }
D2O_FN void atomic_or(uint32_t* place, uint32_t value) { atomicOr(place, value); }
D2O_FN int count_bits(uint32_t value) { return __popc(value); }

#else

// Which thread, and which block, goes first: results must not depend on it. 0: in order; 1: backwards; others: mixed.
inline int schedule = 0;

inline int scheduled(int number, int count) {
  if (schedule == 0) return number;
  if (schedule == 1) return count - 1 - number;
  // An odd step visits every number below a power of two once; those outside are stepped over.
  int size = 1;
  while (size < count) size *= 2;
  int place = -1;
  for (int step = 0, seen = -1; seen < number; ++step) {
    place = static_cast<int>((static_cast<int64_t>(step) * (2 * schedule + 1) + schedule) % size);
    seen += place < count;
  }
  return place;
}

template <class Body>
void phase(Body body) {
  if (schedule < 2) {
    for (int n = 0; n < kThreads; ++n) body(scheduled(n, kThreads));
    return;
  }
  for (int n = 0; n < kThreads; ++n) body((n * (2 * schedule + 1) + schedule) % kThreads);
}

template <class T, int N>
struct PerThread {
  T own[kThreads][N];
  T (&operator[](int thread))[N] { return own[thread]; }
};

inline int atomic_add(int* place, int value) {
  const int old = *place;
  *place += value;
  return old;
}
inline void atomic_or(uint32_t* place, uint32_t value) { *place |= value; }
inline int count_bits(uint32_t value) { return __builtin_popcount(value); }

#endif

template <class To, class From>
D2O_FN To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To out;
  memcpy(&out, &value, sizeof(To));
  return out;
}

D2O_FN int smaller(int a, int b) { return a < b ? a : b; }
D2O_FN int larger(int a, int b) { return a > b ? a : b; }
D2O_FN int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace d2o
