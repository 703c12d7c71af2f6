// The parts of a training step between the large matrix products, each forward and backward in one call; fused.py says how.
//
// Work is cut the same way whatever the number of threads, and partial sums are added in one order.
// Letters as in model/gpt.py: B batch, T time, D model width, H heads, G key-value heads, K width of a head, F feed-forward
// width, V vocabulary; N = B · T rows.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t QUERIES = 48;  // queries that attention takes at once: their scores stay in the second cache
constexpr int64_t CHUNK = 64;    // rows of a norm whose share of the weights' gradient is summed by itself

inline int64_t padded(int64_t n) { return (n + 7) / 8 * 8; }

// The length of a row of n numbers: an odd number of vectors, so that a column's numbers lie in different sets of the cache.
inline int64_t row(int64_t n) { return padded(n) / 16 * 16 + 24; }

// ---------------------------------------------------------------- small products

// R rows of eight or sixteen columns of C (+)= A · B: A is read by strides (so it may lie transposed), B and C by rows. All
// loops over `acc` are unrolled: where one is not, GCC keeps the whole of it in memory.
template <int R, int V>
inline __attribute__((always_inline)) void tile(
    int64_t n, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  __m256 acc[R][V];
#pragma GCC unroll 6
  for (auto& row : acc)
#pragma GCC unroll 2
    for (auto& one : row) one = _mm256_setzero_ps();
  for (int64_t k = 0; k < n; ++k) {
    __m256 right[V];
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) right[j] = _mm256_loadu_ps(b + k * b_row + 8 * j);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const __m256 left = _mm256_broadcast_ss(a + i * a_row + k * a_column);
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) acc[i][j] = _mm256_fmadd_ps(left, right[j], acc[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      float* to = c + i * c_row + 8 * j;
      _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), acc[i][j]) : acc[i][j]);
    }
}

template <int V>
void columns(
    int64_t m, int64_t n, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
    int64_t c_row, bool add) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6) tile<6, V>(n, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add);
  const float* from = a + i * a_row;
  float* to = c + i * c_row;
  switch (m - i) {
    case 5: return tile<5, V>(n, from, a_row, a_column, b, b_row, to, c_row, add);
    case 4: return tile<4, V>(n, from, a_row, a_column, b, b_row, to, c_row, add);
    case 3: return tile<3, V>(n, from, a_row, a_column, b, b_row, to, c_row, add);
    case 2: return tile<2, V>(n, from, a_row, a_column, b, b_row, to, c_row, add);
    case 1: return tile<1, V>(n, from, a_row, a_column, b, b_row, to, c_row, add);
  }
}

// C [m, w] (+)= A [m, n] · B [n, w]; w is a multiple of 8. Sixteen columns of B stand together as a strip, `b_strip` numbers
// from the next one: 16 where B's rows are whole.
void multiply(
    int64_t m, int64_t w, int64_t n, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
    int64_t b_strip, float* c, int64_t c_row, bool add) {
  int64_t j = 0;
  for (; j + 16 <= w; j += 16) columns<2>(m, n, a, a_row, a_column, b + j / 16 * b_strip, b_row, c + j, c_row, add);
  if (j < w) columns<1>(m, n, a, a_row, a_column, b + j / 16 * b_strip, b_row, c + j, c_row, add);
}

// ---------------------------------------------------------------- norms

// y = (x - mean) · inverse · weight + bias; without a bias there is no mean either (RMSNorm).
struct Norm {
  const float *weight, *bias;
  int64_t n;
  float eps;

  void forward(const float* x, float* y) const {
    const __m256 mean = mean_of(x), inverse = _mm256_set1_ps(inverse_of(x, mean));
    for (int64_t i = 0; i < n; i += 8) {
      __m256 value = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), mean), inverse);
      value = _mm256_mul_ps(value, _mm256_loadu_ps(weight + i));
      if (bias) value = _mm256_add_ps(value, _mm256_loadu_ps(bias + i));
      _mm256_storeu_ps(y + i, value);
    }
  }

  // dx += (or =) the gradient that comes through y; the weight's and the bias's are added to. dx and dy may be the same.
  void backward(const float* x, const float* dy, float* dx, bool add, float* dweight, float* dbias) const {
    const __m256 mean = mean_of(x);
    const float inv = inverse_of(x, mean);
    const __m256 inverse = _mm256_set1_ps(inv);
    __m256 total = _mm256_setzero_ps(), along = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) {
      const __m256 normal = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), mean), inverse);
      const __m256 d = _mm256_loadu_ps(dy + i), g = _mm256_mul_ps(d, _mm256_loadu_ps(weight + i));
      total = _mm256_add_ps(total, g);
      along = _mm256_fmadd_ps(g, normal, along);
      _mm256_storeu_ps(dweight + i, _mm256_fmadd_ps(d, normal, _mm256_loadu_ps(dweight + i)));
      if (bias) _mm256_storeu_ps(dbias + i, _mm256_add_ps(d, _mm256_loadu_ps(dbias + i)));
    }
    const __m256 level = _mm256_set1_ps(bias ? sum(total) / n : 0.0f), slope = _mm256_set1_ps(sum(along) / n);
    for (int64_t i = 0; i < n; i += 8) {
      const __m256 normal = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), mean), inverse);
      const __m256 g = _mm256_mul_ps(_mm256_loadu_ps(dy + i), _mm256_loadu_ps(weight + i));
      __m256 d = _mm256_mul_ps(_mm256_sub_ps(_mm256_fnmadd_ps(normal, slope, g), level), inverse);
      if (add) d = _mm256_add_ps(d, _mm256_loadu_ps(dx + i));
      _mm256_storeu_ps(dx + i, d);
    }
  }

 private:
  __m256 mean_of(const float* x) const {
    if (!bias) return _mm256_setzero_ps();
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) total = _mm256_add_ps(total, _mm256_loadu_ps(x + i));
    return _mm256_set1_ps(sum(total) / n);
  }

  float inverse_of(const float* x, __m256 mean) const {
    __m256 squares = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) {
      const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(x + i), mean);
      squares = _mm256_fmadd_ps(d, d, squares);
    }
    return 1 / std::sqrt(sum(squares) / n + eps);
  }
};

void add_up(const std::vector<float>& parts, int64_t count, int64_t n, float* total) {
  std::fill(total, total + n, 0.0f);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t i = 0; i < n; ++i) total[i] += parts[p * n + i];
}

// ---------------------------------------------------------------- attention's parts

// A head's rows [T, K] transposed, in strips of sixteen of their T: [K, 16] each, the last one filled up with zeros.
void transposed_strips(const float* from, int64_t stride, int64_t T, int64_t K, float* to) {
  for (int64_t first = 0; first < T; first += 16, to += 16 * K)
    for (int64_t t = 0; t < 16; ++t)
      for (int64_t k = 0; k < K; ++k) to[16 * k + t] = first + t < T ? from[(first + t) * stride + k] : 0.0f;
}

// The lanes of j..j+7 that are in from..to-1.
inline __m256 between(int64_t from, int64_t to, int64_t j) {
  return _mm256_castsi256_ps(_mm256_andnot_si256(lanes(from - j), lanes(to - j)));
}

// softmax of the scores from..to-1 without those of the hole (two places, or null), and 0 for all others of low..n-1 (multiples
// of 8); log Σ e^x of the scaled scores.
template <bool HOLE>
float softmax(float* x, int64_t low, int64_t from, int64_t to, const int64_t* hole, int64_t n, float scale) {
  const __m256 nothing = _mm256_set1_ps(-INFINITY);
  const int64_t first = from / 8 * 8;
  const auto seen = [&](int64_t j) {
    if constexpr (HOLE) return _mm256_andnot_ps(between(hole[0], hole[1], j), between(from, to, j));
    else return between(from, to, j);
  };
  __m256 most = nothing;
  for (int64_t j = first; j < to; j += 8)
    most = _mm256_max_ps(most, _mm256_blendv_ps(nothing, _mm256_loadu_ps(x + j), seen(j)));
  const float peak = largest(most);
  const __m256 level = _mm256_set1_ps(peak), factor = _mm256_set1_ps(scale);
  __m256 total = _mm256_setzero_ps();
  for (int64_t j = low; j < n; j += 8) {
    if (j < first || j >= to) {
      _mm256_storeu_ps(x + j, _mm256_setzero_ps());
      continue;
    }
    __m256 value = exponential(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + j), level), factor));
    value = _mm256_and_ps(value, seen(j));
    _mm256_storeu_ps(x + j, value);
    total = _mm256_add_ps(total, value);
  }
  const float all = sum(total);
  const __m256 inverse = _mm256_set1_ps(1 / all);
  for (int64_t j = first; j < to; j += 8) _mm256_storeu_ps(x + j, _mm256_mul_ps(_mm256_loadu_ps(x + j), inverse));
  return peak * scale + std::log(all);
}

}  // namespace

extern "C" {

// What attention is told. Rows of `qkv` are [(H + 2G) · K]: queries, keys, values. No weight: no norm; no table: no rotation.
struct Heads {
  int64_t B, T, H, G, K;
  int64_t turns;  // rows of the tables below: T, or B · T where each row has positions of its own
  const float *query_weight, *key_weight, *cosines, *sines;  // [K], [K], [turns, K/2], [turns, K/2]
  const int64_t* starts;  // [B, T], the first position that each one sees; null: 0
  const int64_t* holes;   // [B, T, 2], from where on it does not, and from where on again; null: no hole. Forward alone.
  float eps, unused;
};
}

namespace {

// The head at column `at` of row b, normed and rotated: [T, K].
void take(const Heads& s, const float* qkv, int64_t b, int64_t at, const float* weight, float* to) {
  const int64_t stride = (s.H + 2 * s.G) * s.K, turn = b * s.T % s.turns;
  const float* rows = qkv + b * s.T * stride;
  const Norm norm{weight, nullptr, s.K, s.eps};
  for (int64_t t = 0; t < s.T; ++t) {
    if (weight) norm.forward(rows + t * stride + at, to + t * s.K);
    else std::memcpy(to + t * s.K, rows + t * stride + at, s.K * sizeof(float));
    if (s.cosines) rotate(to + t * s.K, s.cosines + (turn + t) * s.K / 2, s.sines + (turn + t) * s.K / 2, s.K / 2);
  }
}

// T rows of a head in strips of sixteen columns, [T, 16] each, so that a product reads them one after the other.
void strips(const float* from, int64_t stride, int64_t T, int64_t K, float* to) {
  for (int64_t j = 0; j < K; j += 16)
    for (int64_t t = 0; t < T; ++t)
      std::memcpy(to + j * T + 16 * t, from + t * stride + j, std::min<int64_t>(16, K - j) * sizeof(float));
}

// T rows of a head, one below the other: [T, K].
void gather(const float* from, int64_t stride, int64_t T, int64_t K, float* to) {
  for (int64_t t = 0; t < T; ++t) std::memcpy(to + t * K, from + t * stride, K * sizeof(float));
}

// The same way back: the gradient of the head as it was taken [T, K] becomes that of the rows.
void give_back(
    const Heads& s, const float* qkv, int64_t b, int64_t at, const float* weight, float* d, float* dqkv, float* dweight) {
  const int64_t stride = (s.H + 2 * s.G) * s.K, turn = b * s.T % s.turns;
  const float* rows = qkv + b * s.T * stride;
  float* drows = dqkv + b * s.T * stride;
  const Norm norm{weight, nullptr, s.K, s.eps};
  for (int64_t t = 0; t < s.T; ++t) {
    float *one = d + t * s.K, *to = drows + t * stride + at;
    if (s.cosines) rotate(one, s.cosines + (turn + t) * s.K / 2, s.sines + (turn + t) * s.K / 2, s.K / 2, -1);
    if (weight) norm.backward(rows + t * stride + at, one, to, false, dweight, nullptr);
    else std::memcpy(to, one, s.K * sizeof(float));
  }
}

}  // namespace

extern "C" {

// out [N, H · K], logsum [B, H, T]: causal attention over qkv [N, (H + 2G) · K].
void nextword_attend(const Heads* heads, int64_t threads, const float* qkv, float* out, float* logsum) {
  const Heads& s = *heads;
  const int64_t T = s.T, K = s.K, W = (s.H + 2 * s.G) * K, wide = row(T), per_group = s.H / s.G;
  const float scale = 1 / std::sqrt(static_cast<float>(K));
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> q(T * K), k(T * K), v(T * (K + 8)), turned(K * wide), scores(QUERIES * wide);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < s.B * s.G; ++task) {
      const int64_t b = task / s.G, g = task % s.G;
      const float* rows = qkv + b * T * W;
      strips(rows + (s.H + s.G + g) * K, W, T, K, v.data());
      take(s, qkv, b, (s.H + g) * K, s.key_weight, k.data());
      transposed_strips(k.data(), K, T, K, turned.data());
      for (int64_t h = g * per_group; h < (g + 1) * per_group; ++h) {
        take(s, qkv, b, h * K, s.query_weight, q.data());
        for (int64_t first = 0; first < T; first += QUERIES) {
          const int64_t count = std::min(QUERIES, T - first), n = first + count;
          // What no query of these sees lies before `low`: a text's tokens stand together, and its beginning moves on.
          const int64_t low = s.starts ? s.starts[b * T + first] / 16 * 16 : 0;
          multiply(
              count, padded(n) - low, K, &q[first * K], K, 1, &turned[low * K], 16, 16 * K, scores.data() + low, wide, false);
          for (int64_t i = first; i < n; ++i) {
            const int64_t from = s.starts ? s.starts[b * T + i] : 0, *hole = s.holes ? s.holes + 2 * (b * T + i) : nullptr;
            const auto one = hole ? softmax<true> : softmax<false>;
            logsum[(b * s.H + h) * T + i] = one(&scores[(i - first) * wide], low, from, i + 1, hole, padded(n), scale);
          }
          multiply(
              count, K, n - low, scores.data() + low, wide, 1, v.data() + 16 * low, 16, 16 * T,
              out + (b * T + first) * s.H * K + h * K, s.H * K, false);
        }
      }
    }
  }
}

// dqkv, dquery_weight [K] and dkey_weight [K] from dout, with what the forward pass was given and gave.
void nextword_attend_backward(
    const Heads* heads, int64_t threads, const float* qkv, const float* out, const float* logsum, const float* dout,
    float* dqkv, float* dquery_weight, float* dkey_weight) {
  const Heads& s = *heads;
  const int64_t T = s.T, K = s.K, W = (s.H + 2 * s.G) * K, O = s.H * K, wide = row(T), per_group = s.H / s.G;
  const float scale = 1 / std::sqrt(static_cast<float>(K));
  std::vector<float> query_parts(s.B * s.G * K), key_parts(s.B * s.G * K);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> q(T * K), k(T * K), dq(T * K), dk(T * K), dv(T * K), given(T * K);
    std::vector<float> cut(T * (K + 8)), keys(K * wide), values(K * wide), p(QUERIES * wide), ds(QUERIES * wide);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < s.B * s.G; ++task) {
      const int64_t b = task / s.G, g = task % s.G;
      const float* rows = qkv + b * T * W;
      float* drows = dqkv + b * T * W;
      take(s, qkv, b, (s.H + g) * K, s.key_weight, k.data());
      transposed_strips(k.data(), K, T, K, keys.data());
      strips(k.data(), K, T, K, cut.data());
      transposed_strips(rows + (s.H + s.G + g) * K, W, T, K, values.data());
      std::fill(dk.begin(), dk.end(), 0.0f);
      std::fill(dv.begin(), dv.end(), 0.0f);
      for (int64_t h = g * per_group; h < (g + 1) * per_group; ++h) {
        take(s, qkv, b, h * K, s.query_weight, q.data());
        gather(dout + b * T * O + h * K, O, T, K, given.data());
        for (int64_t first = 0; first < T; first += QUERIES) {
          const int64_t count = std::min(QUERIES, T - first), n = first + count, most = padded(n);
          const float *o = out + (b * T + first) * O + h * K, *d = &given[first * K];
          multiply(count, most, K, &q[first * K], K, 1, keys.data(), 16, 16 * K, p.data(), wide, false);
          multiply(count, most, K, d, K, 1, values.data(), 16, 16 * K, ds.data(), wide, false);
          for (int64_t i = 0; i < count; ++i) {
            __m256 product = _mm256_setzero_ps();
            for (int64_t j = 0; j < K; j += 8)
              product = _mm256_fmadd_ps(_mm256_loadu_ps(o + i * O + j), _mm256_loadu_ps(d + i * K + j), product);
            const __m256 delta = _mm256_set1_ps(sum(product)), factor = _mm256_set1_ps(scale);
            const __m256 level = _mm256_set1_ps(logsum[(b * s.H + h) * T + first + i]);
            const int64_t from = s.starts ? s.starts[b * T + first + i] : 0;
            for (int64_t j = 0; j < most; j += 8) {
              const __m256 seen = between(from, first + i + 1, j);
              __m256 share = exponential(_mm256_fmsub_ps(_mm256_loadu_ps(&p[i * wide + j]), factor, level));
              share = _mm256_and_ps(share, seen);
              const __m256 slope = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(&ds[i * wide + j]), delta), factor);
              _mm256_storeu_ps(&p[i * wide + j], share);
              _mm256_storeu_ps(&ds[i * wide + j], _mm256_mul_ps(share, slope));
            }
          }
          multiply(n, K, count, p.data(), 1, wide, d, K, 16, dv.data(), K, true);
          multiply(count, K, n, ds.data(), wide, 1, cut.data(), 16, 16 * T, &dq[first * K], K, false);
          multiply(n, K, count, ds.data(), 1, wide, &q[first * K], K, 16, dk.data(), K, true);
        }
        give_back(s, qkv, b, h * K, s.query_weight, dq.data(), dqkv, &query_parts[task * K]);
      }
      give_back(s, qkv, b, (s.H + g) * K, s.key_weight, dk.data(), dqkv, &key_parts[task * K]);
      for (int64_t t = 0; t < T; ++t)
        std::memcpy(drows + t * W + (s.H + s.G + g) * K, &dv[t * K], K * sizeof(float));
    }
  }
  if (s.query_weight) add_up(query_parts, s.B * s.G, K, dquery_weight);
  if (s.key_weight) add_up(key_parts, s.B * s.G, K, dkey_weight);
}

// sum = x + added (where there is something to add), y = norm(sum); rows [N, D].
void nextword_norm(
    int64_t threads, int64_t N, int64_t D, float eps, const float* x, const float* added, const float* weight,
    const float* bias, float* total, float* y) {
  const Norm norm{weight, bias, D, eps};
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < N; ++r) {
    const float* from = x + r * D;
    if (added) {
      for (int64_t i = 0; i < D; i += 8)
        _mm256_storeu_ps(total + r * D + i, _mm256_add_ps(_mm256_loadu_ps(from + i), _mm256_loadu_ps(added + r * D + i)));
      from = total + r * D;
    }
    norm.forward(from, y + r * D);
  }
}

// dx: what comes through y, and what came to the sum itself (dtotal, or null). dweight, dbias [D].
void nextword_norm_backward(
    int64_t threads, int64_t N, int64_t D, float eps, const float* total, const float* weight, const float* bias,
    const float* dy, const float* dtotal, float* dx, float* dweight, float* dbias) {
  const Norm norm{weight, bias, D, eps};
  const int64_t chunks = (N + CHUNK - 1) / CHUNK;
  std::vector<float> weight_parts(chunks * D), bias_parts(bias ? chunks * D : 0);
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t r = c * CHUNK; r < std::min(N, (c + 1) * CHUNK); ++r) {
      if (dtotal) std::memcpy(dx + r * D, dtotal + r * D, D * sizeof(float));
      norm.backward(
          total + r * D, dy + r * D, dx + r * D, dtotal, &weight_parts[c * D], bias ? &bias_parts[c * D] : nullptr);
    }
  add_up(weight_parts, chunks, D, dweight);
  if (bias) add_up(bias_parts, chunks, D, dbias);
}

enum Activation : int64_t { SWIGLU, RELU, GELU };

// y [N, F] of x: [N, 2F] gate and up side by side for SwiGLU, else [N, F].
void nextword_activate(int64_t threads, int64_t kind, int64_t N, int64_t F, const float* x, float* y) {
  const int64_t width = kind == SWIGLU ? 2 * F : F;
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < N; ++r)
    for (int64_t i = 0; i < F; i += 8) {
      const __m256 a = _mm256_loadu_ps(x + r * width + i);
      __m256 value;
      if (kind == SWIGLU) {
        value = _mm256_mul_ps(_mm256_mul_ps(a, sigmoid(a)), _mm256_loadu_ps(x + r * width + F + i));
      } else if (kind == RELU) {
        value = _mm256_max_ps(a, _mm256_setzero_ps());
      } else {
        const __m256 cube = _mm256_mul_ps(_mm256_mul_ps(a, a), a);
        const __m256 z = _mm256_fmadd_ps(cube, _mm256_set1_ps(GELU_CUBE), a);
        value = _mm256_mul_ps(a, sigmoid(_mm256_mul_ps(z, _mm256_set1_ps(GELU_SLOPE))));
      }
      _mm256_storeu_ps(y + r * F + i, value);
    }
}

void nextword_activate_backward(int64_t threads, int64_t kind, int64_t N, int64_t F, const float* x, const float* dy, float* dx) {
  const int64_t width = kind == SWIGLU ? 2 * F : F;
  const __m256 one = _mm256_set1_ps(1.0f);
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < N; ++r)
    for (int64_t i = 0; i < F; i += 8) {
      const __m256 a = _mm256_loadu_ps(x + r * width + i), d = _mm256_loadu_ps(dy + r * F + i);
      float* to = dx + r * width + i;
      if (kind == SWIGLU) {
        const __m256 s = sigmoid(a), up = _mm256_loadu_ps(x + r * width + F + i);
        const __m256 slope = _mm256_mul_ps(s, _mm256_fmadd_ps(a, _mm256_sub_ps(one, s), one));
        _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_mul_ps(d, up), slope));
        _mm256_storeu_ps(to + F, _mm256_mul_ps(d, _mm256_mul_ps(a, s)));
      } else if (kind == RELU) {
        _mm256_storeu_ps(to, _mm256_and_ps(d, _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ)));
      } else {
        const __m256 square = _mm256_mul_ps(a, a), cube = _mm256_set1_ps(GELU_CUBE), steep = _mm256_set1_ps(GELU_SLOPE);
        const __m256 s = sigmoid(_mm256_mul_ps(_mm256_fmadd_ps(_mm256_mul_ps(square, a), cube, a), steep));
        const __m256 inner = _mm256_mul_ps(steep, _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(3.0f), cube), square, one));
        const __m256 slope = _mm256_fmadd_ps(_mm256_mul_ps(a, _mm256_mul_ps(s, _mm256_sub_ps(one, s))), inner, s);
        _mm256_storeu_ps(to, _mm256_mul_ps(d, slope));
      }
    }
}

// Each row's -log softmax(logits)[target] in nats, and in the logits' place its gradient; a target below 0 counts nothing.
void nextword_cross_entropy(int64_t threads, int64_t N, int64_t V, const int64_t* targets, float* logits, float* losses) {
  const __m256 nothing = _mm256_set1_ps(-INFINITY);
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < N; ++r) {
    float* x = logits + r * V;
    if (targets[r] < 0) {
      std::fill(x, x + V, 0.0f);
      losses[r] = 0;
      continue;
    }
    const int64_t whole = V / 8 * 8;
    const __m256i rest = lanes(V - whole);
    __m256 most = nothing;
    for (int64_t i = 0; i < whole; i += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(x + i));
    if (whole < V) most = _mm256_max_ps(most, _mm256_blendv_ps(nothing, _mm256_maskload_ps(x + whole, rest), _mm256_castsi256_ps(rest)));
    const float peak = largest(most), gold = x[targets[r]];
    const __m256 level = _mm256_set1_ps(peak);
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += 8) {
      const __m256 value = exponential(_mm256_sub_ps(_mm256_loadu_ps(x + i), level));
      _mm256_storeu_ps(x + i, value);
      total = _mm256_add_ps(total, value);
    }
    if (whole < V) {
      __m256 value = exponential(_mm256_sub_ps(_mm256_maskload_ps(x + whole, rest), level));
      value = _mm256_and_ps(value, _mm256_castsi256_ps(rest));
      _mm256_maskstore_ps(x + whole, rest, value);
      total = _mm256_add_ps(total, value);
    }
    const float all = sum(total);
    const __m256 inverse = _mm256_set1_ps(1 / all);
    for (int64_t i = 0; i < whole; i += 8) _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
    for (int64_t i = whole; i < V; ++i) x[i] /= all;
    x[targets[r]] -= 1;
    losses[r] = peak + std::log(all) - gold;
  }
}

// sums [N] = log Σ e^x of each row of x [N, V].
void nextword_log_sums(int64_t threads, int64_t N, int64_t V, const float* logits, float* sums) {
  const __m256 nothing = _mm256_set1_ps(-INFINITY);
  const int64_t whole = V / 8 * 8;
  const __m256i rest = lanes(V - whole);
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < N; ++r) {
    const float* x = logits + r * V;
    __m256 most = nothing, total = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(x + i));
    const __m256 last = _mm256_blendv_ps(nothing, whole < V ? _mm256_maskload_ps(x + whole, rest) : nothing, _mm256_castsi256_ps(rest));
    const float peak = largest(_mm256_max_ps(most, last));
    const __m256 level = _mm256_set1_ps(peak);
    for (int64_t i = 0; i < whole; i += 8) total = _mm256_add_ps(total, exponential(_mm256_sub_ps(_mm256_loadu_ps(x + i), level)));
    total = _mm256_add_ps(total, _mm256_and_ps(exponential(_mm256_sub_ps(last, level)), _mm256_castsi256_ps(rest)));
    sums[r] = peak + std::log(sum(total));
  }
}
}
