// Products of a matrix, in float32 or quantized, with some rows.
//
// Every sum is taken in one order, however many rows and outputs are computed together.

#pragma once

#include <algorithm>
#include <cstring>

#include "vectors.h"

enum Precision : int64_t { FLOAT32, INT8, INT4 };

extern "C" {

// A weight matrix [out, in], row-major. INT8: a scale for each row. INT4: a group of 32 weights, plus 8, in 16 bytes, the first
// 16 in the low halves; a float16 scale for each group. Quantized rows are padded with zeros to a multiple of 32.
struct Matrix {
  const void* data;
  const void* scale;
  const float* bias;
  int64_t precision, out_features, in_features;
};
}

namespace {

// The rows of a product: float32, and for quantized weights also 13-bit integers with a scale for each row.
struct QuantizedInput {
  const float* values;
  const int16_t* integers;
  const float* scales;
  const int32_t* zero_point_sums;  // for int4 weights: -8 times the sum of the integers of a lane
  int64_t stride, int_stride;
};

constexpr int64_t round_up(int64_t n, int64_t to = 32) { return (n + to - 1) / to * to; }

// Quantizes a row to 13-bit integers, padded with zeros to a multiple of 128.
inline void quantize(const float* x, int64_t n, int16_t* out, float* scale) {
  __m256 maximum = _mm256_setzero_ps();
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int64_t i = 0; i < n; i += 8) maximum = _mm256_max_ps(maximum, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
  const float max_abs = largest(maximum);
  *scale = max_abs / 4095;
  __m256 inverse = _mm256_set1_ps(max_abs > 0 ? 4095 / max_abs : 0.0f);
  for (int64_t i = 0; i < n; i += 8) {
    __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
    __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), narrow);
  }
  std::memset(out + n, 0, (round_up(n, 128) - n) * sizeof(int16_t));
}

// Reorders a quantized row to the layout of int4 weights (see dots_int4), and computes its zero-point sums.
inline void interleave_int4(int16_t* x, int64_t n, int32_t* zero_point_sums) {
  int16_t interleaved[4 * PAIRS];
  for (int64_t first = 0; first < round_up(n, 128); first += 4 * PAIRS, x += 4 * PAIRS, zero_point_sums += PAIRS / 2) {
    for (int64_t word = 0; word < PAIRS; ++word)
      for (int64_t v = 0; v < 4; ++v)
        interleaved[v * PAIRS + word] = x[word / 8 * 32 + v % 2 * 16 + word % 8 * 2 + v / 2];
    for (int64_t lane = 0; lane < PAIRS / 2; ++lane) {
      int32_t sum = 0;
      for (int64_t v = 0; v < 4; ++v) sum += interleaved[v * PAIRS + 2 * lane] + interleaved[v * PAIRS + 2 * lane + 1];
      zero_point_sums[lane] = -8 * sum;
    }
    std::memcpy(x, interleaved, sizeof interleaved);
  }
}

// Memory is fastest when read sequentially, but a block of O outputs reads O rows side by side. With PREFETCH (weights that were
// not just read for other rows), each step prefetches the next bytes in memory order, PREFETCH_BYTES ahead.
constexpr int64_t PREFETCH_BYTES = 32 * 1024;

template <bool PREFETCH, int BYTES>
inline void prefetch(const void* weights, int64_t done) {
  if constexpr (PREFETCH)
#pragma GCC unroll 8
    for (int64_t i = 0; i < BYTES; i += 64) _mm_prefetch(static_cast<const char*>(weights) + done + i + PREFETCH_BYTES, _MM_HINT_T1);
}

// O outputs of R rows, with an accumulator in registers for each of the O · R sums. All loops over `acc` are unrolled: otherwise
// GCC keeps the accumulators in memory.
template <int O, int R, bool PREFETCH>
__attribute__((noinline)) void dots_float(const Matrix& m, int64_t o, const QuantizedInput& in, int64_t r, float (&result)[O][R]) {
  const float* w = static_cast<const float*>(m.data) + o * m.in_features;
  const float* x = in.values + r * in.stride;
  __m256 acc[O][R];
#pragma GCC unroll 4
  for (auto& row : acc)
#pragma GCC unroll 4
    for (auto& element : row) element = _mm256_setzero_ps();
  for (int64_t k = 0; k < m.in_features; k += 8) {
    prefetch<PREFETCH, O * 32>(w, O * 32 * (k / 8));
    __m256 weight[O];
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) weight[i] = _mm256_loadu_ps(w + i * m.in_features + k);
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
      __m256 input = _mm256_loadu_ps(x + j * in.stride + k);
#pragma GCC unroll 4
      for (int i = 0; i < O; ++i) acc[i][j] = _mm256_fmadd_ps(weight[i], input, acc[i][j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < O; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) result[i][j] = sum(acc[i][j]);
}

// Integer sums are the same in any order, so few outputs have U accumulators each: a single one would wait for its own latency.
template <int O, int R, bool PREFETCH>
__attribute__((noinline)) void dots_int8(const Matrix& m, int64_t o, const QuantizedInput& in, int64_t r, float (&result)[O][R]) {
  constexpr int U = O * R < 4 ? 4 / (O * R) : 1;
  const int64_t n = round_up(m.in_features);
  const int8_t* w = static_cast<const int8_t*>(m.data) + o * n;
  const int16_t* x = in.integers + r * in.int_stride;
  Integers acc[U][O][R];
#pragma GCC unroll 4
  for (auto& part : acc)
#pragma GCC unroll 4
    for (auto& row : part)
#pragma GCC unroll 4
      for (auto& element : row) element = no_integers();
  const auto step = [&](int64_t k, Integers(&sums)[O][R]) __attribute__((always_inline)) {
    Integers weight[O];
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) weight[i] = widened(w + i * n + k);
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
      const Integers input = loaded(x + j * in.int_stride + k);
#pragma GCC unroll 4
      for (int i = 0; i < O; ++i) add_products(sums[i][j], weight[i], input);
    }
  };
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + U * PAIRS <= n; k += U * PAIRS) {
    prefetch<PREFETCH, O * U * PAIRS>(w, O * k);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) step(k + u * PAIRS, acc[u]);
  }
  if constexpr (U > 1)
#pragma GCC unroll 1
    for (; k < n; k += PAIRS) step(k, acc[0]);
  const float* scale = static_cast<const float*>(m.scale) + o;
#pragma GCC unroll 4
  for (int i = 0; i < O; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
      Integers total = acc[0][i][j];
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) total = added(total, acc[u][i][j]);
      result[i][j] = sum(total) * (scale[i] * in.scales[r + j]);
    }
}

// A vector of bytes holds GROUPS groups of 32 weights, in words of four: the lowest four bits of all words are one vector of
// weights, the next four bits another. Rows are reordered accordingly (interleave_int4). Weights are stored plus 8; sums start at
// the zero-point sums, which cancel that.
template <int O, int R, bool PREFETCH>
__attribute__((noinline)) void dots_int4(const Matrix& m, int64_t o, const QuantizedInput& in, int64_t r, float (&result)[O][R]) {
  const int64_t bytes = round_up(m.in_features) / 2, groups = round_up(m.in_features) / 32;
  const uint8_t* w = static_cast<const uint8_t*>(m.data) + o * bytes;
  const uint16_t* scale = static_cast<const uint16_t*>(m.scale) + o * groups;
  const int16_t* x = in.integers + r * in.int_stride;
  const int32_t* zero_points = in.zero_point_sums + r * (in.int_stride / 8);
  Floats acc[O][R];
#pragma GCC unroll 4
  for (auto& row : acc)
#pragma GCC unroll 4
    for (auto& element : row) element = zeros();
  const auto step = [&](int64_t g, auto load, auto load_scales) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) {
      const Integers words = load(w + i * bytes + 16 * g);
      const Integers weight[4] = {quarter<0>(words), quarter<1>(words), quarter<2>(words), quarter<3>(words)};
      const Floats group_scale = load_scales(scale + i * groups + g);
#pragma GCC unroll 4
      for (int j = 0; j < R; ++j) {
        Integers products = loaded(zero_points + j * (in.int_stride / 8) + 4 * g);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
          add_products(products, weight[v], loaded(x + j * in.int_stride + 32 * g + v * PAIRS));
        acc[i][j] = fused(as_floats(products), group_scale, acc[i][j]);
      }
    }
  };
  int64_t g = 0;
  for (; g + GROUPS <= groups; g += GROUPS) {
    prefetch<PREFETCH, O * 16 * GROUPS>(w, O * 16 * g);
    step(g, [](const uint8_t* p) { return loaded(p); }, [](const uint16_t* p) { return scales(p); });
  }
  if (const int64_t left = groups - g)
    step(g, [left](const uint8_t* p) { return loaded(p, left); }, [left](const uint16_t* p) { return scales(p, left); });
#pragma GCC unroll 4
  for (int i = 0; i < O; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) result[i][j] = sum(acc[i][j]) * in.scales[r + j];
}

template <int O, int R, bool PREFETCH, class Store>
inline void compute_block(const Matrix& m, int64_t o, const QuantizedInput& in, int64_t r, const Store& store) {
  float result[O][R];
  if (m.precision == FLOAT32) dots_float<O, R, PREFETCH>(m, o, in, r, result);
  else if (m.precision == INT8) dots_int8<O, R, PREFETCH>(m, o, in, r, result);
  else dots_int4<O, R, PREFETCH>(m, o, in, r, result);
  for (int i = 0; i < O; ++i)
    for (int j = 0; j < R; ++j) store(o + i, r + j, result[i][j] + (m.bias ? m.bias[o + i] : 0.0f));
}

// O outputs of rows r to last - 1, R rows at a time, and half as many for the rest.
template <int O, int R, bool PREFETCH, class Store>
inline void row_blocks(const Matrix& m, int64_t o, const QuantizedInput& in, int64_t r, int64_t last, const Store& store) {
  if (r + R <= last) {
    compute_block<O, R, PREFETCH>(m, o, in, r, store);
    for (r += R; r + R <= last; r += R) compute_block<O, R, false>(m, o, in, r, store);
    if constexpr (R > 1)
      if (r < last) row_blocks<O, R / 2, false>(m, o, in, r, last, store);
  } else if constexpr (R > 1) {
    row_blocks<O, R / 2, PREFETCH>(m, o, in, r, last, store);
  }
}

// Calls store(output, row, value) for outputs begin to end - 1 and rows first to last - 1, in blocks of O outputs and R rows.
template <int O, int R, class Store>
inline void tile_blocks(const Matrix& m, const QuantizedInput& in, int64_t first, int64_t last, int64_t begin, int64_t end, const Store& store) {
  int64_t o = begin;
  for (; o + O <= end; o += O) row_blocks<O, R, true>(m, o, in, first, last, store);
  for (; o < end; ++o) row_blocks<1, R, true>(m, o, in, first, last, store);
}

constexpr int64_t TILE_BYTES = 64 * 1024;  // rows that stay in the L2 cache while all outputs are computed
constexpr int INT8_BLOCK = PAIRS == 32 ? 4 : 3;  // outputs and rows of a block: AVX-512 has twice as many registers

// Calls store(output, row, value) for the outputs begin to end - 1 of all rows.
template <class Store>
void matmul(const Matrix& m, const QuantizedInput& in, int64_t rows, int64_t begin, int64_t end, const Store& store) {
  if (rows == 1) return tile_blocks<1, 1>(m, in, 0, 1, begin, end, store);
  const int64_t bytes = m.in_features * (m.precision == FLOAT32 ? 4 : 2), tile = std::max<int64_t>(12, TILE_BYTES / bytes / 12 * 12);
  for (int64_t r = 0; r < rows; r += tile) {
    const int64_t last = std::min(rows, r + tile);
    if (m.precision == INT8) tile_blocks<INT8_BLOCK, INT8_BLOCK>(m, in, r, last, begin, end, store);
    else tile_blocks<3, 4>(m, in, r, last, begin, end, store);
  }
}

}  // namespace
