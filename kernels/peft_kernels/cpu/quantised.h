// Weights in 4 and 8 bits a number, as bitsandbytes lays them out, made numbers again; see quantised_weight.py.

#pragma once

#include "maths.h"

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
  int64_t numbers;

  float top(int64_t block) const {
    return narrow ? inner_table[narrow[block]] * inner_absmax[block / inner_blocksize] + *offset : absmax[block];
  }
};

// A block at a time: the 16 numbers that it can hold are scaled and rounded once, the rest is looking them up.
template <int KIND>
void four_bits(const FourBits& w, typename Narrow<KIND>::type* out, int threads) {
  const int64_t blocks = (w.numbers + w.blocksize - 1) / w.blocksize;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * w.blocksize, left = w.numbers - first, count = left < w.blocksize ? left : w.blocksize;
    const float top = w.top(b);
    typename Narrow<KIND>::type scaled[16];
    for (int c = 0; c < 16; ++c) scaled[c] = rounded<KIND>(w.table[c] * top);
    const uint8_t* from = w.codes + first / 2;
    typename Narrow<KIND>::type* to = out + first;
    for (int64_t k = 0; k < count / 2; ++k) {
      to[2 * k] = scaled[from[k] >> 4];
      to[2 * k + 1] = scaled[from[k] & 15];
    }
    if (count & 1) to[count - 1] = scaled[from[count / 2] >> 4];
  }
}

template <int KIND>
void eight_bits(const int8_t* codes, const float* absmax, int64_t rows, int64_t n, typename Narrow<KIND>::type* out,
                int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const float s = absmax[i];
    for (int64_t k = 0; k < n; ++k) out[i * n + k] = rounded<KIND>((float)codes[i * n + k] * s * 0.007874015718698502f);
  }
}

}  // namespace

// out (numbers,) of the dtype that `kind` names, from nf4 or fp4 codes.
API void dequantise_4bit(const uint8_t* codes, const float* table, int64_t blocksize, const float* absmax,
                         const uint8_t* narrow, const float* inner_table, const float* inner_absmax,
                         const float* offset, int64_t inner_blocksize, int64_t numbers, int64_t kind, void* out,
                         int threads) {
  const FourBits w{codes,        table,        blocksize, absmax,          narrow,
                   inner_table,  inner_absmax, offset,    inner_blocksize, numbers};
  if (kind == 0) four_bits<0>(w, (float*)out, threads);
  else if (kind == 1) four_bits<1>(w, (uint16_t*)out, threads);
  else four_bits<2>(w, (uint16_t*)out, threads);
}

// out (rows, n) of the dtype that `kind` names: codes ⊙ absmax / 127, row by row.
API void dequantise_8bit(const int8_t* codes, const float* absmax, int64_t rows, int64_t n, int64_t kind, void* out,
                         int threads) {
  if (kind == 0) eight_bits<0>(codes, absmax, rows, n, (float*)out, threads);
  else if (kind == 1) eight_bits<1>(codes, absmax, rows, n, (uint16_t*)out, threads);
  else eight_bits<2>(codes, absmax, rows, n, (uint16_t*)out, threads);
}
