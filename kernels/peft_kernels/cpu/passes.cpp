// Passes over memory that a training step on a CPU makes around its matrix products; built and called by
// peft_kernels/_compiled.py, and each defined in plain torch beside the Python function that calls it.
//
// Tensors are fp32 and row-major unless named otherwise; a stride counts elements from row to row. Every function
// shares rows (or samples) out over `threads` threads of torch's own OpenMP pool. No result depends on their number,
// but the sums of `drop_back`. Compiled without contraction of a*b+c and without fast-math, so that `quantise` and
// `rescale` have the bits of plain torch.

#include "maths.h"
#include "quantised.h"

// codes[i] = round(v/scale[i]), scale[i] = max|v|/127, over the parts of row i laid end to end; v = x ⊙ factor. Rows of
// zeros have scale 1, rows with NaN or infinity scale NaN and codes 0. A part without x is zeros.
API void quantise(int64_t parts, const float* const* x, const int64_t* strides, const int64_t* widths,
                  const float* const* factors, int64_t rows, int64_t total, int8_t* codes, float* scales, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    int32_t top = 0;
    for (int64_t p = 0; p < parts; ++p) {
      if (!x[p]) continue;
      const float* row = x[p] + i * strides[p];
      const int32_t t = factors[p] ? top_bits<true>(row, factors[p], widths[p]) : top_bits<false>(row, nullptr, widths[p]);
      top = t > top ? t : top;
    }
    const float largest = as_float(top);
    float scale = largest / 127.0f;
    scale = top >= 0x7f800000 ? as_float(0x7fc00000) : top == 0 ? 1.0f : scale < LEAST ? LEAST : scale;
    const float inverse = 1.0f / scale;
    scales[i] = scale;
    int8_t* out = codes + i * total;
    if (top == 0 || top >= 0x7f800000) {
      memset(out, 0, (size_t)total);
      continue;
    }
    for (int64_t p = 0; p < parts; ++p) {
      if (!x[p]) {
        memset(out, 0, (size_t)widths[p]);
      } else {
        const float* row = x[p] + i * strides[p];
        if (factors[p]) round_row<true>(row, factors[p], inverse, out, widths[p]);
        else round_row<false>(row, nullptr, inverse, out, widths[p]);
      }
      out += widths[p];
    }
  }
}

// found[j] = max over rows of |x[i][j]|, NaN above infinity: in blocks of columns that stay in the nearest cache.
API void column_absmax(const float* x, int64_t stride, int64_t rows, int64_t n, float* found, int threads) {
  constexpr int64_t BLOCK = 256;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < n; first += BLOCK) {
    const int64_t width = n - first < BLOCK ? n - first : BLOCK;
    int32_t top[BLOCK] = {};
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = x + i * stride + first;
      for (int64_t k = 0; k < width; ++k) {
        const int32_t b = bits(row[k]) & 0x7fffffff;
        top[k] = b > top[k] ? b : top[k];
      }
    }
    for (int64_t k = 0; k < width; ++k) found[first + k] = as_float(top[k]);
  }
}

// y = products·row_scale ⊙ column_scale + bias, each of the last two where given.
API void rescale(const int32_t* products, int64_t products_stride, int64_t rows, int64_t n, const float* row_scale,
                 const float* column_scale, const float* bias, float* y, int64_t y_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t* from = products + i * products_stride;
    float* to = y + i * y_stride;
    const float s = row_scale[i];
    if (column_scale && bias) {
      for (int64_t j = 0; j < n; ++j) to[j] = (float)from[j] * s * column_scale[j] + bias[j];
    } else if (column_scale) {
      for (int64_t j = 0; j < n; ++j) to[j] = (float)from[j] * s * column_scale[j];
    } else {
      for (int64_t j = 0; j < n; ++j) to[j] = (float)from[j] * s;
    }
  }
}

// h = silu(gate) ⊙ up.
API void swiglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t rows, int64_t n,
                float* h, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const float *g = gate + i * gate_stride, *u = up + i * up_stride;
    float* to = h + i * n;
    for (int64_t k = 0; k < n; ++k) to[k] = g[k] * sigmoid(g[k]) * u[k];
  }
}

// dup = dh ⊙ silu(gate), dgate = dh ⊙ up ⊙ silu'(gate).
API void swiglu_back(const float* dh, int64_t dh_stride, const float* gate, int64_t gate_stride, const float* up,
                     int64_t up_stride, int64_t rows, int64_t n, float* dgate, float* dup, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const float *d = dh + i * dh_stride, *g = gate + i * gate_stride, *u = up + i * up_stride;
    float *to_gate = dgate + i * n, *to_up = dup + i * n;
    for (int64_t k = 0; k < n; ++k) {
      const float s = sigmoid(g[k]);
      to_up[k] = d[k] * (g[k] * s);
      to_gate[k] = d[k] * u[k] * (s * (1.0f + g[k] * (1.0f - s)));
    }
  }
}

// y = x·rstd ⊙ weight. With eps ≥ 0 rstd = 1/√(mean(x²) + eps) is made first, else it is given.
API void rms_norm(const float* x, int64_t x_stride, const float* weight, int64_t rows, int64_t n, float eps, float* rstd,
                  float* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = x + i * x_stride;
    float* to = y + i * n;
    if (eps >= 0.0f) {
      float lanes[WIDE] = {}, sum = 0.0f;
      int64_t k = 0;
      for (; k + WIDE <= n; k += WIDE)
        for (int64_t l = 0; l < WIDE; ++l) lanes[l] += from[k + l] * from[k + l];
      for (; k < n; ++k) sum += from[k] * from[k];
      for (int64_t l = 0; l < WIDE; ++l) sum += lanes[l];
      rstd[i] = 1.0f / __builtin_sqrtf(sum / (float)n + eps);
    }
    const float s = rstd[i];
    for (int64_t k = 0; k < n; ++k) to[k] = from[k] * s * weight[k];
  }
}

// dx = rstd·t - x·rstd³·mean(t ⊙ x), t = dy ⊙ weight.
API void rms_norm_back(const float* dy, int64_t dy_stride, const float* x, int64_t x_stride, const float* rstd,
                       const float* weight, int64_t rows, int64_t n, float* dx, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const float *g = dy + i * dy_stride, *from = x + i * x_stride;
    float* to = dx + i * n;
    float lanes[WIDE] = {}, sum = 0.0f;
    int64_t k = 0;
    for (; k + WIDE <= n; k += WIDE)
      for (int64_t l = 0; l < WIDE; ++l) lanes[l] += g[k + l] * weight[k + l] * from[k + l];
    for (; k < n; ++k) sum += g[k] * weight[k] * from[k];
    for (int64_t l = 0; l < WIDE; ++l) sum += lanes[l];
    const float s = rstd[i], share = s * s * (sum / (float)n);
    for (k = 0; k < n; ++k) to[k] = s * (g[k] * weight[k] - from[k] * share);
  }
}

// Dropped places come as they are drawn: for each sample `draws` flat places in rising order, those from `size` of the
// whole (samples·rows_each·features) on are none.

// x = 0 at dropped places, x (samples·size,).
API void zero_places(const int64_t* places, int64_t samples, int64_t draws, int64_t size, float* x, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t s = 0; s < samples; ++s)
    for (int64_t d = 0; d < draws && places[s * draws + d] < samples * size; ++d) x[places[s * draws + d]] = 0.0f;
}

// x = softmax(x) along dense rows, logs[i] = log Σ e^x. Rows of -∞ alone become zeros and their logs 0.
API void softmax_rows(float* x, int64_t rows, int64_t n, float* logs, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    float* z = x + i * n;
    float lanes[WIDE], sums[WIDE] = {};
    for (int64_t l = 0; l < WIDE; ++l) lanes[l] = -__builtin_inff();
    int64_t k = 0;
    for (; k + WIDE <= n; k += WIDE)
      for (int64_t l = 0; l < WIDE; ++l) lanes[l] = z[k + l] > lanes[l] ? z[k + l] : lanes[l];
    float top = lanes[0], total = 0.0f;
    for (int64_t l = 1; l < WIDE; ++l) top = lanes[l] > top ? lanes[l] : top;
    for (; k < n; ++k) top = z[k] > top ? z[k] : top;
    const float from = top == -__builtin_inff() ? 0.0f : top;
    for (k = 0; k + WIDE <= n; k += WIDE)
      for (int64_t l = 0; l < WIDE; ++l) {
        z[k + l] = exp_or_zero(z[k + l] - from);
        sums[l] += z[k + l];
      }
    for (; k < n; ++k) {
      z[k] = exp_or_zero(z[k] - from);
      total += z[k];
    }
    for (int64_t l = 0; l < WIDE; ++l) total += sums[l];
    logs[i] = total == 0.0f ? 0.0f : from + __builtin_logf(total);
    const float by = total == 0.0f ? 0.0f : 1.0f / total;
    for (k = 0; k < n; ++k) z[k] *= by;
  }
}

// x = e^(x - logs), the softmax again.
API void softmax_again(float* x, int64_t rows, int64_t n, const float* logs, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < n; ++k) x[i * n + k] = exp_or_zero(x[i * n + k] - logs[i]);
}

// dp = (dp - shares[i]) ⊙ p: the softmax's backward, shares[i] = Σ dp ⊙ p of a row.
API void softmax_back(float* dp, const float* p, const float* shares, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < n; ++k) dp[i * n + k] = (dp[i * n + k] - shares[i]) * p[i * n + k];
}

// low (rows, rank) -= Σ over dropped (i, k) of x[i, k]·down[k], with down (features, rank).
API void drop_down(const int64_t* places, int64_t samples, int64_t draws, int64_t rows, int64_t features, const float* x,
                   int64_t x_stride, const float* down, int64_t down_stride, int64_t rank, float* low, int64_t low_stride, int threads) {
  const int64_t size = rows * features;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t s = 0; s < samples; ++s) {
    for (int64_t d = 0; d < draws; ++d) {
      const int64_t place = places[s * draws + d];
      if (place >= size) break;
      const int64_t i = place / features, k = place - i * features;
      add_scaled(low + i * low_stride, down + k * down_stride, -x[i * x_stride + k], rank);
    }
  }
}

// The same places in backward: sums[t] (features, rank) gets Σ x[i, k]·d_low[i] where x is given, one such sum for each
// of `pieces` equal runs of samples; dx[i, k] -= d_low[i]·down[k] where dx is given.
API void drop_back(const int64_t* places, int64_t samples, int64_t draws, int64_t rows, int64_t features, const float* x,
                   int64_t x_stride, const float* d_low, int64_t d_stride, const float* down, int64_t down_stride, int64_t rank, float* dx,
                   int64_t dx_stride, float* sums, int64_t pieces, int threads) {
  const int64_t size = rows * features;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < pieces; ++p) {
    float* own = sums ? sums + p * features * rank : nullptr;
    for (int64_t s = samples * p / pieces; s < samples * (p + 1) / pieces; ++s) {
      for (int64_t d = 0; d < draws; ++d) {
        const int64_t place = places[s * draws + d];
        if (place >= size) break;
        const int64_t i = place / features, k = place - i * features;
        const float* low = d_low + i * d_stride;
        if (own) add_scaled(own + k * rank, low, x[i * x_stride + k], rank);
        if (dx) dx[i * dx_stride + k] -= dot(low, down + k * down_stride, rank);
      }
    }
  }
}

// y = y·shrink + products·row_scale.
API void rescale_add(const int32_t* products, int64_t products_stride, int64_t rows, int64_t n, const float* row_scale,
                     const float* shrink, float* y, int64_t y_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t* from = products + i * products_stride;
    float* to = y + i * y_stride;
    const float s = row_scale[i], by = shrink[i];
    for (int64_t j = 0; j < n; ++j) to[j] = to[j] * by + (float)from[j] * s;
  }
}

// One block of columns of a softmax over logits z = products·row_scale ⊙ column_scale. tops and totals, max z and
// Σ e^(z - top) of the blocks before, take this one in; shrink[i] = e^(top before - top); chosen[i] = z[target] where the
// target lies in this block. With codes, e^(z - top) ⊙ column_scale without the target's is rounded to int8, with a scale
// for each row. `scratch` holds a row for each thread. Rows whose scale is NaN give NaN.
API void softmax_block(const int32_t* products, int64_t rows, int64_t n, const float* row_scale,
                       const float* column_scale, const int64_t* targets, float* tops, float* totals, float* chosen,
                       float* shrink, int8_t* codes, float* scales, float* scratch, int threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int t = 0; t < threads; ++t) {
    float* z = scratch + t * n;
    for (int64_t i = rows * t / threads; i < rows * (t + 1) / threads; ++i) {
      const int32_t* from = products + i * n;
      const float s = row_scale[i], before = tops[i];
      const int64_t target = targets[i];
      const bool here = target >= 0 && target < n;
      if (s != s) {
        tops[i] = totals[i] = shrink[i] = s;
        if (here) chosen[i] = s;
        if (codes) {
          memset(codes + i * n, 0, (size_t)n);
          scales[i] = s;
        }
        continue;
      }
      float lanes[WIDE];
      for (int64_t l = 0; l < WIDE; ++l) lanes[l] = before;
      int64_t j = 0;
      for (; j + WIDE <= n; j += WIDE)
        for (int64_t l = 0; l < WIDE; ++l) {
          const float v = (float)from[j + l] * s * column_scale[j + l];
          z[j + l] = v;
          lanes[l] = v > lanes[l] ? v : lanes[l];
        }
      float top = lanes[0];
      for (int64_t l = 1; l < WIDE; ++l) top = lanes[l] > top ? lanes[l] : top;
      for (; j < n; ++j) {
        z[j] = (float)from[j] * s * column_scale[j];
        top = z[j] > top ? z[j] : top;
      }
      if (here) chosen[i] = z[target];
      float sums[WIDE] = {}, most[WIDE] = {};
      for (j = 0; j + WIDE <= n; j += WIDE)
        for (int64_t l = 0; l < WIDE; ++l) {
          const float e = exp_of(z[j + l] - top);
          sums[l] += e;
          const float g = e * column_scale[j + l];
          z[j + l] = g;
          most[l] = g > most[l] ? g : most[l];
        }
      float total = 0.0f, largest = 0.0f;
      for (; j < n; ++j) {
        const float e = exp_of(z[j] - top);
        total += e;
        z[j] = e * column_scale[j];
        largest = z[j] > largest ? z[j] : largest;
      }
      for (int64_t l = 0; l < WIDE; ++l) total += sums[l];
      const float by = exp_of(before - top);
      tops[i] = top;
      shrink[i] = by;
      totals[i] = totals[i] * by + total;
      if (!codes) continue;
      if (here) {
        z[target] = largest = 0.0f;
        for (j = 0; j < n; ++j) largest = z[j] > largest ? z[j] : largest;
      } else {
        for (int64_t l = 0; l < WIDE; ++l) largest = most[l] > largest ? most[l] : largest;
      }
      float scale = largest / 127.0f;
      scale = largest == 0.0f ? 1.0f : scale < LEAST ? LEAST : scale;
      scales[i] = scale;
      round_row<false>(z, nullptr, 1.0f / scale, codes + i * n, n);
    }
  }
}

// Places of dropped elements from random words, as dropout.py draws them: gaps log(u)·inverse with u = word·2^-32 + ½,
// added up for each sample. Places from `size` on become samples·size.
API void draw_places(const int32_t* words, int64_t samples, int64_t draws, int64_t size, float inverse, int64_t* places,
                     int threads) {
  constexpr int64_t STEP = 256;
  const int64_t none = samples * size;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t s = 0; s < samples; ++s) {
    const int32_t* from = words + s * draws;
    int64_t* to = places + s * draws;
    int64_t place = -1, d = 0;
    for (; d < draws && place < size; d += STEP) {
      const int64_t count = d + STEP < draws ? STEP : draws - d;
      int32_t gaps[STEP];
      for (int64_t c = 0; c < count; ++c) {
        float u = (float)from[d + c] * 0x1p-32f + 0.5f;
        u = u < 0x1p-26f ? 0x1p-26f : u;
        u = u < 0.99999994f ? u : 0.99999994f;
        const float gap = log_of(u) * inverse;
        gaps[c] = (int32_t)(gap < 2e9f ? gap : 2e9f);
      }
      for (int64_t c = 0; c < count; ++c) {
        place += gaps[c] + 1;
        to[d + c] = place < size ? s * size + place : none;
      }
    }
    for (; d < draws; ++d) to[d] = none;
  }
}
