// Functions and constants of passes.cpp: vectors are left to the compiler, so everything is inlined.

#pragma once

#include <cstdint>
#include <cstring>

#define API extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr float ROUND = 12582912.0f;  // 1.5·2²³: a number below 2²² added to it loses its fraction, half to even
constexpr float LEAST = 0x1p-126f;    // scales from here on: the inverse of a smaller one would overflow
constexpr int64_t WIDE = 16;

INLINE int32_t bits(float v) { return __builtin_bit_cast(int32_t, v); }
INLINE float as_float(int32_t v) { return __builtin_bit_cast(float, v); }

// Largest |v|, as bits: for floats without sign they have the order of the numbers, NaN above infinity.
template <bool FACTOR>
INLINE int32_t top_bits(const float* x, const float* factor, int64_t n) {
  int32_t top = 0;
  for (int64_t k = 0; k < n; ++k) {
    const int32_t b = bits(FACTOR ? x[k] * factor[k] : x[k]) & 0x7fffffff;
    top = b > top ? b : top;
  }
  return top;
}

template <bool FACTOR>
INLINE void round_row(const float* x, const float* factor, float inverse, int8_t* codes, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    const float v = FACTOR ? x[k] * factor[k] : x[k];
    codes[k] = (int8_t)(bits(v * inverse + ROUND) - bits(ROUND));
  }
}

// e^x to two units in the last place for x in [-87, 88], where it is cut off (Cephes' polynomial). NaN gives anything.
INLINE float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = __builtin_fmaf(x, 1.44269504088896341f, ROUND);
  const float n = shifted - ROUND;
  float r = __builtin_fmaf(n, -0.693359375f, x);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r + 1.0f);
  return as_float(bits(p) + ((bits(shifted) - bits(ROUND)) << 23));
}

// e^x for x ≤ 88, 0 below -87, NaN for NaN.
INLINE float exp_or_zero(float x) {
  const float e = exp_of(x);
  return x >= -87.0f ? e : x < -87.0f ? 0.0f : x;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// log x for x in [2^-26, 1), to an ulp (Cephes' polynomial).
INLINE float log_of(float x) {
  int32_t e = (bits(x) >> 23) - 126;
  float m = as_float((bits(x) & 0x007fffff) | 0x3f000000);  // in [½, 1)
  const bool low = m < 0.707106781186547524f;
  e = low ? e - 1 : e;
  m = low ? m + m - 1.0f : m - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = __builtin_fmaf(p, m, -1.1514610310e-1f);
  p = __builtin_fmaf(p, m, 1.1676998740e-1f);
  p = __builtin_fmaf(p, m, -1.2420140846e-1f);
  p = __builtin_fmaf(p, m, 1.4249322787e-1f);
  p = __builtin_fmaf(p, m, -1.6668057665e-1f);
  p = __builtin_fmaf(p, m, 2.0000714765e-1f);
  p = __builtin_fmaf(p, m, -2.4999993993e-1f);
  p = __builtin_fmaf(p, m, 3.3333331174e-1f);
  float y = m * z * p;
  y = __builtin_fmaf((float)e, -2.12194440e-4f, y);
  y = __builtin_fmaf(z, -0.5f, y);
  return __builtin_fmaf((float)e, 0.693359375f, m + y);
}

// to += v·from, by whole vectors of a length that the compiler knows.
INLINE void add_scaled(float* __restrict to, const float* __restrict from, float v, int64_t n) {
  int64_t r = 0;
  for (; r + WIDE <= n; r += WIDE)
    for (int64_t l = 0; l < WIDE; ++l) to[r + l] += v * from[r + l];
  for (; r < n; ++r) to[r] += v * from[r];
}

INLINE float dot(const float* a, const float* b, int64_t n) {
  float lanes[WIDE] = {}, sum = 0.0f;
  int64_t r = 0;
  for (; r + WIDE <= n; r += WIDE)
    for (int64_t l = 0; l < WIDE; ++l) lanes[l] += a[r + l] * b[r + l];
  for (; r < n; ++r) sum += a[r] * b[r];
  for (int64_t l = 0; l < 8; ++l) lanes[l] += lanes[l + 8];
  for (int64_t l = 0; l < 4; ++l) lanes[l] += lanes[l + 4];
  return sum + ((lanes[0] + lanes[2]) + (lanes[1] + lanes[3]));
}

// The same over long rows, with four sums on the way at once.
INLINE float dot_wide(const float* a, const float* b, int64_t n) {
  float lanes[4 * WIDE] = {}, sum = 0.0f;
  int64_t r = 0;
  for (; r + 4 * WIDE <= n; r += 4 * WIDE)
    for (int64_t l = 0; l < 4 * WIDE; ++l) lanes[l] = __builtin_fmaf(a[r + l], b[r + l], lanes[l]);
  for (; r < n; ++r) sum += a[r] * b[r];
  for (int64_t l = 0; l < 2 * WIDE; ++l) lanes[l] += lanes[l + 2 * WIDE];
  for (int64_t l = 0; l < WIDE; ++l) lanes[l] += lanes[l + WIDE];
  for (int64_t l = 0; l < 8; ++l) lanes[l] += lanes[l + 8];
  for (int64_t l = 0; l < 4; ++l) lanes[l] += lanes[l + 4];
  return sum + ((lanes[0] + lanes[2]) + (lanes[1] + lanes[3]));
}

// A number in the three dtypes that weights are unpacked to, rounded half to even: float (0), bfloat16 (1), float16 (2).
template <int KIND> struct Narrow { using type = uint16_t; };
template <> struct Narrow<0> { using type = float; };

template <int KIND>
INLINE typename Narrow<KIND>::type rounded(float v) {
  if constexpr (KIND == 0) {
    return v;
  } else {
    const uint32_t b = (uint32_t)bits(v), size = b & 0x7fffffff;
    if constexpr (KIND == 1) {
      const uint32_t up = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
      return (uint16_t)(size > 0x7f800000 ? 0x7fc0 : up);
    } else {
      const uint32_t sign = (b >> 16) & 0x8000;
      if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
      if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and up
      if (size < 0x38800000)  // below 2⁻¹⁴ the step is 2⁻²⁴, that of float from ½ to 1
        return (uint16_t)(sign | (uint32_t)(bits(as_float((int32_t)size) + 0.5f) - bits(0.5f)));
      return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
    }
  }
}

}  // namespace
