// Products of a matrix, whole or in fewer bits, with some rows.
//
// Every sum is taken in one order, however many rows and outputs are taken together.

#pragma once

#include <algorithm>
#include <cstring>

#include "vectors.h"

enum Kind : int64_t { FLOAT32, INT8, INT4 };

extern "C" {

// [out, in], row by row. INT8: one scale a row. INT4: 16 bytes for 32 weights plus 8, the first 16 in the low halves; their
// scales are float16, one for 32. The rows of both are padded with zeros to a multiple of 32.
struct Matrix {
  const void* data;
  const void* scale;
  const float* bias;
  int64_t kind, out, in;
};
}

namespace {

// Rows as a product takes them: float32, and for quantised weights as integers of 13 bits with a scale each.
struct Input {
  const float* values;
  const int16_t* integers;
  const float* scales;
  const int32_t* starts;  // of weights in four bits: -8 times the sums of what meets in a lane
  int64_t stride, stride_integers;
};

constexpr int64_t padded(int64_t n, int64_t to = 32) { return (n + to - 1) / to * to; }

// Into whole numbers of 13 bits, with zeros up to a multiple of 128.
inline void quantise(const float* x, int64_t n, int16_t* out, float* scale) {
  __m256 most = _mm256_setzero_ps();
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int64_t i = 0; i < n; i += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
  const float peak = largest(most);
  *scale = peak / 4095;
  __m256 inverse = _mm256_set1_ps(peak > 0 ? 4095 / peak : 0.0f);
  for (int64_t i = 0; i < n; i += 8) {
    __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
    __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), narrow);
  }
  std::memset(out + n, 0, (padded(n, 128) - n) * sizeof(int16_t));
}

// Whole numbers in the order in which weights of four bits meet them, and where their sums start.
inline void turn(int16_t* x, int64_t n, int32_t* starts) {
  int16_t turned[4 * PAIRS];
  for (int64_t first = 0; first < padded(n, 128); first += 4 * PAIRS, x += 4 * PAIRS, starts += PAIRS / 2) {
    for (int64_t word = 0; word < PAIRS; ++word)
      for (int64_t v = 0; v < 4; ++v)
        turned[v * PAIRS + word] = x[word / 8 * 32 + v % 2 * 16 + word % 8 * 2 + v / 2];
    for (int64_t lane = 0; lane < PAIRS / 2; ++lane) {
      int32_t sum = 0;
      for (int64_t v = 0; v < 4; ++v) sum += turned[v * PAIRS + 2 * lane] + turned[v * PAIRS + 2 * lane + 1];
      starts[lane] = -8 * sum;
    }
    std::memcpy(x, turned, sizeof turned);
  }
}

// Memory is read the quickest from one end to the other; a block of O outputs reads O rows side by side. So where weights are
// FRESH, not read for other rows just before, each step calls for what comes next in the order of memory, some way AHEAD.
constexpr int64_t AHEAD = 32 * 1024;

template <bool FRESH, int BYTES>
inline void call_ahead(const void* weights, int64_t done) {
  if constexpr (FRESH)
#pragma GCC unroll 8
    for (int64_t i = 0; i < BYTES; i += 64) _mm_prefetch(static_cast<const char*>(weights) + done + i + AHEAD, _MM_HINT_T1);
}

// O outputs of R rows: each of the O · R sums has an accumulator of its own, in registers. All loops over `acc` are unrolled:
// where one is not, GCC keeps the whole of it in memory.
template <int O, int R, bool FRESH>
__attribute__((noinline)) void dots_float(const Matrix& m, int64_t o, const Input& in, int64_t r, float (&result)[O][R]) {
  const float* w = static_cast<const float*>(m.data) + o * m.in;
  const float* x = in.values + r * in.stride;
  __m256 acc[O][R];
#pragma GCC unroll 4
  for (auto& row : acc)
#pragma GCC unroll 4
    for (auto& one : row) one = _mm256_setzero_ps();
  for (int64_t k = 0; k < m.in; k += 8) {
    call_ahead<FRESH, O * 32>(w, O * 32 * (k / 8));
    __m256 weight[O];
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) weight[i] = _mm256_loadu_ps(w + i * m.in + k);
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
      __m256 one = _mm256_loadu_ps(x + j * in.stride + k);
#pragma GCC unroll 4
      for (int i = 0; i < O; ++i) acc[i][j] = _mm256_fmadd_ps(weight[i], one, acc[i][j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < O; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) result[i][j] = sum(acc[i][j]);
}

// Sums of whole numbers come out the same in any order, so a row by itself has U sums for each output: a single one would
// wait for itself.
template <int O, int R, bool FRESH>
__attribute__((noinline)) void dots_int8(const Matrix& m, int64_t o, const Input& in, int64_t r, float (&result)[O][R]) {
  constexpr int U = O * R < 4 ? 4 / (O * R) : 1;
  const int64_t n = padded(m.in);
  const int8_t* w = static_cast<const int8_t*>(m.data) + o * n;
  const int16_t* x = in.integers + r * in.stride_integers;
  Integers acc[U][O][R];
#pragma GCC unroll 4
  for (auto& part : acc)
#pragma GCC unroll 4
    for (auto& row : part)
#pragma GCC unroll 4
      for (auto& one : row) one = no_integers();
  const auto step = [&](int64_t k, Integers(&sums)[O][R]) __attribute__((always_inline)) {
    Integers weight[O];
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) weight[i] = widened(w + i * n + k);
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
      const Integers one = loaded(x + j * in.stride_integers + k);
#pragma GCC unroll 4
      for (int i = 0; i < O; ++i) add_products(sums[i][j], weight[i], one);
    }
  };
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + U * PAIRS <= n; k += U * PAIRS) {
    call_ahead<FRESH, O * U * PAIRS>(w, O * k);
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

// A vector of bytes holds GROUPS groups of 32 weights, as words of four: the lowest four bits of each word are one vector of
// weights, the next four another. A row lies in that order (`turn`), and what its numbers have too much by, since the weights
// are written with 8 added, is where its sums begin.
template <int O, int R, bool FRESH>
__attribute__((noinline)) void dots_int4(const Matrix& m, int64_t o, const Input& in, int64_t r, float (&result)[O][R]) {
  const int64_t bytes = padded(m.in) / 2, groups = padded(m.in) / 32;
  const uint8_t* w = static_cast<const uint8_t*>(m.data) + o * bytes;
  const uint16_t* scale = static_cast<const uint16_t*>(m.scale) + o * groups;
  const int16_t* x = in.integers + r * in.stride_integers;
  const int32_t* start = in.starts + r * (in.stride_integers / 8);
  Floats acc[O][R];
#pragma GCC unroll 4
  for (auto& row : acc)
#pragma GCC unroll 4
    for (auto& one : row) one = zeros();
  const auto step = [&](int64_t g, auto load, auto load_scales) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) {
      const Integers words = load(w + i * bytes + 16 * g);
      const Integers weight[4] = {quarter<0>(words), quarter<1>(words), quarter<2>(words), quarter<3>(words)};
      const Floats factor = load_scales(scale + i * groups + g);
#pragma GCC unroll 4
      for (int j = 0; j < R; ++j) {
        Integers products = loaded(start + j * (in.stride_integers / 8) + 4 * g);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
          add_products(products, weight[v], loaded(x + j * in.stride_integers + 32 * g + v * PAIRS));
        acc[i][j] = fused(as_floats(products), factor, acc[i][j]);
      }
    }
  };
  int64_t g = 0;
  for (; g + GROUPS <= groups; g += GROUPS) {
    call_ahead<FRESH, O * 16 * GROUPS>(w, O * 16 * g);
    step(g, [](const uint8_t* p) { return loaded(p); }, [](const uint16_t* p) { return scales(p); });
  }
  if (const int64_t left = groups - g)
    step(g, [left](const uint8_t* p) { return loaded(p, left); }, [left](const uint16_t* p) { return scales(p, left); });
#pragma GCC unroll 4
  for (int i = 0; i < O; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) result[i][j] = sum(acc[i][j]) * in.scales[r + j];
}

template <int O, int R, bool FRESH, class Put>
inline void block(const Matrix& m, int64_t o, const Input& in, int64_t r, const Put& put) {
  float result[O][R];
  if (m.kind == FLOAT32) dots_float<O, R, FRESH>(m, o, in, r, result);
  else if (m.kind == INT8) dots_int8<O, R, FRESH>(m, o, in, r, result);
  else dots_int4<O, R, FRESH>(m, o, in, r, result);
  for (int i = 0; i < O; ++i)
    for (int j = 0; j < R; ++j) put(o + i, r + j, result[i][j] + (m.bias ? m.bias[o + i] : 0.0f));
}

// O outputs of the rows r … last, R at a time; of what is left half as many.
template <int O, int R, bool FRESH, class Put>
inline void rows_of(const Matrix& m, int64_t o, const Input& in, int64_t r, int64_t last, const Put& put) {
  if (r + R <= last) {
    block<O, R, FRESH>(m, o, in, r, put);
    for (r += R; r + R <= last; r += R) block<O, R, false>(m, o, in, r, put);
    if constexpr (R > 1)
      if (r < last) rows_of<O, R / 2, false>(m, o, in, r, last, put);
  } else if constexpr (R > 1) {
    rows_of<O, R / 2, FRESH>(m, o, in, r, last, put);
  }
}

// put(output, row, value) for outputs begin … end and rows first … last, in blocks of O outputs and R rows.
template <int O, int R, class Put>
inline void blocks(const Matrix& m, const Input& in, int64_t first, int64_t last, int64_t begin, int64_t end, const Put& put) {
  int64_t o = begin;
  for (; o + O <= end; o += O) rows_of<O, R, true>(m, o, in, first, last, put);
  for (; o < end; ++o) rows_of<1, R, true>(m, o, in, first, last, put);
}

constexpr int64_t TILE = 64 * 1024;  // bytes of rows that stay in the second cache while they are taken through all outputs
constexpr int INT8_BLOCK = PAIRS == 32 ? 4 : 3;  // outputs and rows at once: AVX-512 has twice as many registers

template <class Put>
void product(const Matrix& m, const Input& in, int64_t rows, int64_t begin, int64_t end, const Put& put) {
  if (rows == 1) return blocks<1, 1>(m, in, 0, 1, begin, end, put);
  const int64_t bytes = m.in * (m.kind == FLOAT32 ? 4 : 2), tile = std::max<int64_t>(12, TILE / bytes / 12 * 12);
  for (int64_t r = 0; r < rows; r += tile) {
    const int64_t last = std::min(rows, r + tile);
    if (m.kind == INT8) blocks<INT8_BLOCK, INT8_BLOCK>(m, in, r, last, begin, end, put);
    else blocks<3, 4>(m, in, r, last, begin, end, put);
  }
}

}  // namespace
