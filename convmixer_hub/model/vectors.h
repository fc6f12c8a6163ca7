// Vectors of numbers, and GELU of them, for the C++ files beside this one.

#pragma once

#include <ATen/ATen.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using at::BFloat16;

// As many numbers as a register holds: with longer vectors, GCC goes through memory.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }

inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }

// A bfloat16 is the upper half of an fp32 number.
inline Floats load(const BFloat16* from) {
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
}

inline void store(BFloat16* to, Floats x) {
#ifdef __AVX512BF16__
  *reinterpret_cast<Halves*>(to) = (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  Bits bits = (Bits)x;
  bits += 0x7fff + ((bits >> 16) & 1);  // to the nearest, ties to even
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(bits >> 16, Halves);
#endif
}

inline void add(float* to, Floats x) { store(to, load(to) + x); }

// exp(-z * z / 2) = 2^power = 2^whole * 2^f: a polynomial in f, then `whole` added to the exponent.
inline Floats bell(Floats z) {
  constexpr float rounding = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  Floats power = z * z * -0.72134752f;
  Floats whole = power + rounding;
  Floats f = power - (whole - rounding);
  Floats exp2 = 1.32764707e-3f * f + 9.67554132e-3f;  // relative error 1e-7
  exp2 = ((exp2 * f + 5.55071328e-2f) * f + 2.40221197e-1f) * f + 6.93146967e-1f;
  exp2 = exp2 * f + 1.00000007f;
  // Beyond |z| = 9 it is negligible, and a denormal number would slow some CPUs down.
  Floats result = (Floats)((Ints)exp2 + ((Ints)whole << 23));
  return z * z < 81.0f ? result : Floats{};
}

// Exact GELU, z * cdf(z) with the normal distribution's cdf, and its derivative: to 1e-6.
inline void gelu(Floats z, Floats& y, Floats& slope) {
  Floats density = bell(z);  // times sqrt(2 pi)
  Floats distance = z < 0.0f ? -z : z;
  // Abramowitz & Stegun 7.1.26: erf to 1.5e-7 from the exponential that is needed anyway.
  Floats t = 1.0f / (0.231641888f * distance + 1.0f);
  Floats series = ((0.5307027145f * t - 0.7265760135f) * t + 0.7107068705f) * t - 0.142248368f;
  Floats tail = (series * t + 0.127414796f) * t * density;
  Floats cdf = z < 0.0f ? tail : 1.0f - tail;
  y = z * cdf;
  slope = cdf + z * density * 0.398942280f;
}

}  // namespace
