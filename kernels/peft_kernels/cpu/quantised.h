// Weights in 4 and 8 bits a number, as bitsandbytes lays them out, made numbers again; see quantised_weight.py.

#pragma once

#include "maths.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

struct FourBits {
  const uint8_t* codes;       // two a byte, the first in its upper half
  const float* table;         // (16,)
  int64_t blocksize;          // numbers of an absmax, even
  const float* absmax;        // (blocks,), null where nested:
  const uint8_t* narrow;      // (blocks,)
  const float* inner_table;   // (256,)
  const float* inner_absmax;  // (blocks of inner_blocksize blocks,)
  const float* offset;        // (1,)
  int64_t inner_blocksize;

  float top(int64_t block) const {
    return narrow ? inner_table[narrow[block]] * inner_absmax[block / inner_blocksize] + *offset : absmax[block];
  }
};

// to[i] = scaled[code i], from the first code of a byte on.
template <typename T>
INLINE void look_up(const uint8_t* codes, const T* scaled, int64_t count, T* to) {
  int64_t k = 0;
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) {  // 16 at a time: the table is one register
    const __m512 table = _mm512_loadu_ps(scaled);
    const __m512i shifts = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
    for (; k + 16 <= count; k += 16) {
      int32_t words[2];
      memcpy(words, codes + k / 2, 8);
      const __m512i lower = _mm512_castsi256_si512(_mm256_set1_epi32(words[0]));
      const __m512i both = _mm512_inserti64x4(lower, _mm256_set1_epi32(words[1]), 1);
      _mm512_storeu_ps(to + k, _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shifts), table));
    }
  }
#endif
  for (; k + 2 <= count; k += 2) {
    to[k] = scaled[codes[k / 2] >> 4];
    to[k + 1] = scaled[codes[k / 2] & 15];
  }
  if (k < count) to[k] = scaled[codes[k / 2] >> 4];
}

// Numbers first … last-1, first even: a block at a time, whose 16 possible numbers are scaled and rounded once.
template <int KIND>
INLINE void unpack(const FourBits& w, int64_t first, int64_t last, typename Narrow<KIND>::type* to) {
  while (first < last) {
    const int64_t block = first / w.blocksize, end = (block + 1) * w.blocksize < last ? (block + 1) * w.blocksize : last;
    const float top = w.top(block);
    typename Narrow<KIND>::type scaled[16];
    for (int c = 0; c < 16; ++c) scaled[c] = rounded<KIND>(w.table[c] * top);
    look_up(w.codes + first / 2, scaled, end - first, to);
    to += end - first;
    first = end;
  }
}

template <int KIND>
void four_bits(const FourBits& w, int64_t numbers, typename Narrow<KIND>::type* out, int threads) {
  const int64_t blocks = (numbers + w.blocksize - 1) / w.blocksize;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * w.blocksize, last = first + w.blocksize < numbers ? first + w.blocksize : numbers;
    unpack<KIND>(w, first, last, out + first);
  }
}

template <int KIND>
INLINE void unpack_row(const int8_t* codes, float absmax, int64_t n, typename Narrow<KIND>::type* to) {
  for (int64_t k = 0; k < n; ++k) to[k] = rounded<KIND>((float)codes[k] * absmax * 0.007874015718698502f);
}

template <int KIND>
void eight_bits(const int8_t* codes, const float* absmax, int64_t rows, int64_t n, typename Narrow<KIND>::type* out,
                int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) unpack_row<KIND>(codes + i * n, absmax[i], n, out + i * n);
}

// y (m, n) = x (m, k)·Wᵀ for few rows of x: each row of W is made numbers in a thread's own buffer, which stays in the
// cache, and read m times. `row(j, to)` makes row j; `scratch` holds k numbers for each thread.
template <typename Row>
void few_rows(Row row, const float* x, int64_t x_stride, int64_t m, int64_t n, int64_t k, float* y, float* scratch,
              int threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int t = 0; t < threads; ++t) {
    float* numbers = scratch + t * k;
    for (int64_t j = n * t / threads; j < n * (t + 1) / threads; ++j) {
      row(j, numbers);
      for (int64_t i = 0; i < m; ++i) y[i * n + j] = dot_wide(x + i * x_stride, numbers, k);
    }
  }
}

}  // namespace

// out (numbers,) of the dtype that `kind` names, from nf4 or fp4 codes.
API void dequantise_4bit(const uint8_t* codes, const float* table, int64_t blocksize, const float* absmax,
                         const uint8_t* narrow, const float* inner_table, const float* inner_absmax,
                         const float* offset, int64_t inner_blocksize, int64_t numbers, int64_t kind, void* out,
                         int threads) {
  const FourBits w{codes, table, blocksize, absmax, narrow, inner_table, inner_absmax, offset, inner_blocksize};
  if (kind == 0) four_bits<0>(w, numbers, (float*)out, threads);
  else if (kind == 1) four_bits<1>(w, numbers, (uint16_t*)out, threads);
  else four_bits<2>(w, numbers, (uint16_t*)out, threads);
}

// out (rows, n) of the dtype that `kind` names: codes ⊙ absmax / 127, row by row.
API void dequantise_8bit(const int8_t* codes, const float* absmax, int64_t rows, int64_t n, int64_t kind, void* out,
                         int threads) {
  if (kind == 0) eight_bits<0>(codes, absmax, rows, n, (float*)out, threads);
  else if (kind == 1) eight_bits<1>(codes, absmax, rows, n, (uint16_t*)out, threads);
  else eight_bits<2>(codes, absmax, rows, n, (uint16_t*)out, threads);
}

// y (m, n) = x·Wᵀ of few rows over nf4 or fp4 codes of W (n, k), k even.
API void few_rows_4bit(const uint8_t* codes, const float* table, int64_t blocksize, const float* absmax,
                       const uint8_t* narrow, const float* inner_table, const float* inner_absmax, const float* offset,
                       int64_t inner_blocksize, const float* x, int64_t x_stride, int64_t m, int64_t n, int64_t k,
                       float* y, float* scratch, int threads) {
  const FourBits w{codes, table, blocksize, absmax, narrow, inner_table, inner_absmax, offset, inner_blocksize};
  const auto row = [&w, k](int64_t j, float* to) { unpack<0>(w, j * k, (j + 1) * k, to); };
  few_rows(row, x, x_stride, m, n, k, y, scratch, threads);
}

// The same over int8 codes.
API void few_rows_8bit(const int8_t* codes, const float* absmax, const float* x, int64_t x_stride, int64_t m, int64_t n,
                       int64_t k, float* y, float* scratch, int threads) {
  const auto row = [codes, absmax, k](int64_t j, float* to) { unpack_row<0>(codes + j * k, absmax[j], k, to); };
  few_rows(row, x, x_stride, m, n, k, y, scratch, threads);
}
