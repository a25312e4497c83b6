// Storage types of keys and values. Everything is computed in float32.
#pragma once

#include "block.cuh"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace d2o {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

D2O_FN float to_float(float x) { return x; }
D2O_FN float to_float(Bf16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
D2O_FN T from_float(float x);

template <>
D2O_FN float from_float<float>(float x) {
  return x;
}

// To nearest, ties to even; NaN stays NaN.
template <>
D2O_FN Bf16 from_float<Bf16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return Bf16{0x7fff};
  return Bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

#ifdef __CUDACC__

D2O_FN float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

template <>
D2O_FN Half from_float<Half>(float x) {
  return Half{__half_as_ushort(__float2half_rn(x))};
}

#else

inline float to_float(Half x) {
  const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return x.bits >> 15 ? -size : size;
}

template <>
inline Half from_float<Half>(float x) {
  const uint16_t sign = (bits_as<uint32_t>(x) >> 31) << 15;
  const float size = std::fabs(x);
  if (size != size) return Half{0x7fff};
  if (size >= 65520.0f) return Half{static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = size > 0 ? std::ilogb(size) : -14;
  if (exponent < -14) exponent = -14;
  // Units of the last place; what rounds up to 2048 carries into the exponent by itself.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return Half{static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}

#endif

// Four numbers that are loaded at once.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};

// Sixteen bytes that are moved at once.
struct alignas(16) Wide {
  uint32_t at[4];
};

}  // namespace d2o
