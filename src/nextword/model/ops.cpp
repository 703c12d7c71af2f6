// The operators of ops.py: what a training step computes between its large matrix products, forward and backward.
//
// Work is split and partial sums are added in the same way for every number of threads, so that results do not depend on it.
// Shapes as in model/gpt.py: B batch, T time, D model width, H query heads, G key-value heads, K width of a head, F feed-forward
// width, V vocabulary; N = B · T rows.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t QUERY_BLOCK = 48;      // queries of attention at once: their scores stay in the L2 cache
constexpr int64_t NORM_GRAD_CHUNK = 64;  // rows of a norm whose weight gradients are summed separately

inline int64_t round_up_8(int64_t n) { return (n + 7) / 8 * 8; }

// Row stride of n columns: an odd number of vectors, so that the elements of a column lie in different cache sets.
inline int64_t padded_row_stride(int64_t n) { return round_up_8(n) / 16 * 16 + 24; }

// ---------------------------------------------------------------- small matrix products

// R rows of 8 V columns of C (+)= A · B. A is read by strides (it may be transposed), B and C by rows. All loops over `acc`
// are unrolled: otherwise GCC keeps the accumulators in memory.
template <int R, int V>
inline __attribute__((always_inline)) void tile(
    int64_t n, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  __m256 acc[R][V];
#pragma GCC unroll 6
  for (auto& row : acc)
#pragma GCC unroll 2
    for (auto& element : row) element = _mm256_setzero_ps();
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
void matmul_columns(
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

// C [m, w] (+)= A [m, n] · B [n, w]; w is a multiple of 8. B is packed in strips of sixteen columns, `b_strip` elements apart
// (16 for a matrix that is not packed).
void matmul(
    int64_t m, int64_t w, int64_t n, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
    int64_t b_strip, float* c, int64_t c_row, bool add) {
  int64_t j = 0;
  for (; j + 16 <= w; j += 16) matmul_columns<2>(m, n, a, a_row, a_column, b + j / 16 * b_strip, b_row, c + j, c_row, add);
  if (j < w) matmul_columns<1>(m, n, a, a_row, a_column, b + j / 16 * b_strip, b_row, c + j, c_row, add);
}

// ---------------------------------------------------------------- norms

// y = (x - mean) · inverse · weight + bias, where inverse = 1 / standard deviation. RMSNorm has neither mean nor bias.
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

  // Sets dx, or adds to it, and adds to the gradients of weight and bias. dx and dy may be the same.
  void backward(const float* x, const float* dy, float* dx, bool add, float* dweight, float* dbias) const {
    const __m256 mean = mean_of(x);
    const float inv = inverse_of(x, mean);
    const __m256 inverse = _mm256_set1_ps(inv);
    __m256 grad_sum = _mm256_setzero_ps(), grad_dot = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) {
      const __m256 normal = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), mean), inverse);
      const __m256 d = _mm256_loadu_ps(dy + i), g = _mm256_mul_ps(d, _mm256_loadu_ps(weight + i));
      grad_sum = _mm256_add_ps(grad_sum, g);
      grad_dot = _mm256_fmadd_ps(g, normal, grad_dot);
      _mm256_storeu_ps(dweight + i, _mm256_fmadd_ps(d, normal, _mm256_loadu_ps(dweight + i)));
      if (bias) _mm256_storeu_ps(dbias + i, _mm256_add_ps(d, _mm256_loadu_ps(dbias + i)));
    }
    const __m256 mean_grad = _mm256_set1_ps(bias ? sum(grad_sum) / n : 0.0f), mean_dot = _mm256_set1_ps(sum(grad_dot) / n);
    for (int64_t i = 0; i < n; i += 8) {
      const __m256 normal = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), mean), inverse);
      const __m256 g = _mm256_mul_ps(_mm256_loadu_ps(dy + i), _mm256_loadu_ps(weight + i));
      __m256 d = _mm256_mul_ps(_mm256_sub_ps(_mm256_fnmadd_ps(normal, mean_dot, g), mean_grad), inverse);
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

void reduce_partials(const std::vector<float>& partials, int64_t count, int64_t n, float* total) {
  std::fill(total, total + n, 0.0f);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t i = 0; i < n; ++i) total[i] += partials[p * n + i];
}

// ---------------------------------------------------------------- helpers of attention

// Packs a head [T, K] transposed, in strips of sixteen rows: [K, 16] each, the last one padded with zeros.
void pack_transposed(const float* from, int64_t stride, int64_t T, int64_t K, float* to) {
  for (int64_t first = 0; first < T; first += 16, to += 16 * K)
    for (int64_t t = 0; t < 16; ++t)
      for (int64_t k = 0; k < K; ++k) to[16 * k + t] = first + t < T ? from[(first + t) * stride + k] : 0.0f;
}

// The lanes of positions j to j + 7 that are in [from, to).
inline __m256 range_mask(int64_t from, int64_t to, int64_t j) {
  return _mm256_castsi256_ps(_mm256_andnot_si256(lanes(from - j), lanes(to - j)));
}

// Softmax of the scores in [from, to) without those in [gap[0], gap[1]), in place; 0 elsewhere in [low, n), where low and n
// are multiples of 8. Returns the log-sum-exp of the scaled scores.
template <bool HAS_GAP>
float softmax(float* x, int64_t low, int64_t from, int64_t to, const int64_t* gap, int64_t n, float scale) {
  const __m256 minus_infinity = _mm256_set1_ps(-INFINITY);
  const int64_t first = from / 8 * 8;
  const auto visible = [&](int64_t j) {
    if constexpr (HAS_GAP) return _mm256_andnot_ps(range_mask(gap[0], gap[1], j), range_mask(from, to, j));
    else return range_mask(from, to, j);
  };
  __m256 maximum = minus_infinity;
  for (int64_t j = first; j < to; j += 8)
    maximum = _mm256_max_ps(maximum, _mm256_blendv_ps(minus_infinity, _mm256_loadu_ps(x + j), visible(j)));
  const float max_logit = largest(maximum);
  const __m256 shift = _mm256_set1_ps(max_logit), factor = _mm256_set1_ps(scale);
  __m256 total = _mm256_setzero_ps();
  for (int64_t j = low; j < n; j += 8) {
    if (j < first || j >= to) {
      _mm256_storeu_ps(x + j, _mm256_setzero_ps());
      continue;
    }
    __m256 value = exponential(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + j), shift), factor));
    value = _mm256_and_ps(value, visible(j));
    _mm256_storeu_ps(x + j, value);
    total = _mm256_add_ps(total, value);
  }
  const float all = sum(total);
  const __m256 inverse = _mm256_set1_ps(1 / all);
  for (int64_t j = first; j < to; j += 8) _mm256_storeu_ps(x + j, _mm256_mul_ps(_mm256_loadu_ps(x + j), inverse));
  return max_logit * scale + std::log(all);
}

// Arguments of attention. Rows of `qkv` are [(H + 2G) · K]: queries, keys, values. Null pointers switch a feature off.
struct AttentionArgs {
  int64_t B, T, H, G, K;
  int64_t rotary_rows;  // rows of cos and sin: T, or B · T with positions for each row of the batch
  const float *query_weight, *key_weight, *cos, *sin;  // [K], [K], [rotary_rows, K/2], [rotary_rows, K/2]
  const int64_t* segment_starts;  // [B, T], the first position that each token attends to
  const int64_t* attention_gaps;  // [B, T, 2], first and end of the positions that it does not attend to; forward only
  float eps;
};

// Copies the head at column `at` of batch row b, normalized and rotated, to [T, K].
void load_head(const AttentionArgs& s, const float* qkv, int64_t b, int64_t at, const float* weight, float* to) {
  const int64_t stride = (s.H + 2 * s.G) * s.K, rotary_row = b * s.T % s.rotary_rows;
  const float* rows = qkv + b * s.T * stride;
  const Norm norm{weight, nullptr, s.K, s.eps};
  for (int64_t t = 0; t < s.T; ++t) {
    if (weight) norm.forward(rows + t * stride + at, to + t * s.K);
    else std::memcpy(to + t * s.K, rows + t * stride + at, s.K * sizeof(float));
    if (s.cos) rotate(to + t * s.K, s.cos + (rotary_row + t) * s.K / 2, s.sin + (rotary_row + t) * s.K / 2, s.K / 2);
  }
}

// Packs T rows of a head in strips of sixteen columns, [T, 16] each, the order in which a product reads them.
void pack_columns(const float* from, int64_t stride, int64_t T, int64_t K, float* to) {
  for (int64_t j = 0; j < K; j += 16)
    for (int64_t t = 0; t < T; ++t)
      std::memcpy(to + j * T + 16 * t, from + t * stride + j, std::min<int64_t>(16, K - j) * sizeof(float));
}

// Copies T rows of a head to [T, K].
void gather_head(const float* from, int64_t stride, int64_t T, int64_t K, float* to) {
  for (int64_t t = 0; t < T; ++t) std::memcpy(to + t * K, from + t * stride, K * sizeof(float));
}

// The backward pass of load_head: from the gradient of the head [T, K] to that of the rows of qkv.
void store_head_grad(
    const AttentionArgs& s, const float* qkv, int64_t b, int64_t at, const float* weight, float* d, float* dqkv, float* dweight) {
  const int64_t stride = (s.H + 2 * s.G) * s.K, rotary_row = b * s.T % s.rotary_rows;
  const float* rows = qkv + b * s.T * stride;
  float* drows = dqkv + b * s.T * stride;
  const Norm norm{weight, nullptr, s.K, s.eps};
  for (int64_t t = 0; t < s.T; ++t) {
    float *dhead = d + t * s.K, *to = drows + t * stride + at;
    if (s.cos) rotate(dhead, s.cos + (rotary_row + t) * s.K / 2, s.sin + (rotary_row + t) * s.K / 2, s.K / 2, -1);
    if (weight) norm.backward(rows + t * stride + at, dhead, to, false, dweight, nullptr);
    else std::memcpy(to, dhead, s.K * sizeof(float));
  }
}

}  // namespace

extern "C" {

// Causal attention over qkv [N, (H + 2G) · K]: out [N, H · K] and logsumexp [B, H, T].
void nextword_attention_forward(
    int64_t threads, int64_t B, int64_t T, int64_t H, int64_t G, int64_t K, int64_t rotary_rows, const float* query_weight,
    const float* key_weight, const float* cos, const float* sin, const int64_t* segment_starts, const int64_t* attention_gaps,
    float eps, const float* qkv, float* out, float* logsumexp) {
  const AttentionArgs s{B, T, H, G, K, rotary_rows, query_weight, key_weight, cos, sin, segment_starts, attention_gaps, eps};
  const int64_t W = (s.H + 2 * s.G) * K, score_stride = padded_row_stride(T), heads_per_group = s.H / s.G;
  const float scale = 1 / std::sqrt(static_cast<float>(K));
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> q(T * K), k(T * K), v(T * (K + 8)), transposed_keys(K * score_stride), scores(QUERY_BLOCK * score_stride);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < s.B * s.G; ++task) {
      const int64_t b = task / s.G, g = task % s.G;
      const float* rows = qkv + b * T * W;
      pack_columns(rows + (s.H + s.G + g) * K, W, T, K, v.data());
      load_head(s, qkv, b, (s.H + g) * K, s.key_weight, k.data());
      pack_transposed(k.data(), K, T, K, transposed_keys.data());
      for (int64_t h = g * heads_per_group; h < (g + 1) * heads_per_group; ++h) {
        load_head(s, qkv, b, h * K, s.query_weight, q.data());
        for (int64_t first = 0; first < T; first += QUERY_BLOCK) {
          const int64_t count = std::min(QUERY_BLOCK, T - first), n = first + count;
          // No query of this block attends to positions before `low`: documents are contiguous, and their starts increase.
          const int64_t low = s.segment_starts ? s.segment_starts[b * T + first] / 16 * 16 : 0;
          matmul(
              count, round_up_8(n) - low, K, &q[first * K], K, 1, &transposed_keys[low * K], 16, 16 * K, scores.data() + low,
              score_stride, false);
          for (int64_t i = first; i < n; ++i) {
            const int64_t from = s.segment_starts ? s.segment_starts[b * T + i] : 0;
            const int64_t* gap = s.attention_gaps ? s.attention_gaps + 2 * (b * T + i) : nullptr;
            const auto softmax_row = gap ? softmax<true> : softmax<false>;
            logsumexp[(b * s.H + h) * T + i] = softmax_row(&scores[(i - first) * score_stride], low, from, i + 1, gap, round_up_8(n), scale);
          }
          matmul(
              count, K, n - low, scores.data() + low, score_stride, 1, v.data() + 16 * low, 16, 16 * T,
              out + (b * T + first) * s.H * K + h * K, s.H * K, false);
        }
      }
    }
  }
}

// dqkv, dquery_weight [K] and dkey_weight [K] from dout, and the inputs and outputs of the forward pass.
void nextword_attention_backward(
    int64_t threads, int64_t B, int64_t T, int64_t H, int64_t G, int64_t K, int64_t rotary_rows, const float* query_weight,
    const float* key_weight, const float* cos, const float* sin, const int64_t* segment_starts, const int64_t* attention_gaps,
    float eps, const float* qkv, const float* out, const float* logsumexp, const float* dout, float* dqkv,
    float* dquery_weight, float* dkey_weight) {
  const AttentionArgs s{B, T, H, G, K, rotary_rows, query_weight, key_weight, cos, sin, segment_starts, attention_gaps, eps};
  const int64_t W = (s.H + 2 * s.G) * K, O = s.H * K, score_stride = padded_row_stride(T), heads_per_group = s.H / s.G;
  const float scale = 1 / std::sqrt(static_cast<float>(K));
  std::vector<float> query_partials(s.B * s.G * K), key_partials(s.B * s.G * K);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> q(T * K), k(T * K), dq(T * K), dk(T * K), dv(T * K), dout_head(T * K);
    std::vector<float> packed_keys(T * (K + 8)), transposed_keys(K * score_stride), transposed_values(K * score_stride);
    std::vector<float> p(QUERY_BLOCK * score_stride), ds(QUERY_BLOCK * score_stride);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < s.B * s.G; ++task) {
      const int64_t b = task / s.G, g = task % s.G;
      const float* rows = qkv + b * T * W;
      float* drows = dqkv + b * T * W;
      load_head(s, qkv, b, (s.H + g) * K, s.key_weight, k.data());
      pack_transposed(k.data(), K, T, K, transposed_keys.data());
      pack_columns(k.data(), K, T, K, packed_keys.data());
      pack_transposed(rows + (s.H + s.G + g) * K, W, T, K, transposed_values.data());
      std::fill(dk.begin(), dk.end(), 0.0f);
      std::fill(dv.begin(), dv.end(), 0.0f);
      for (int64_t h = g * heads_per_group; h < (g + 1) * heads_per_group; ++h) {
        load_head(s, qkv, b, h * K, s.query_weight, q.data());
        gather_head(dout + b * T * O + h * K, O, T, K, dout_head.data());
        for (int64_t first = 0; first < T; first += QUERY_BLOCK) {
          const int64_t count = std::min(QUERY_BLOCK, T - first), n = first + count, n_padded = round_up_8(n);
          const float *o = out + (b * T + first) * O + h * K, *d = &dout_head[first * K];
          matmul(count, n_padded, K, &q[first * K], K, 1, transposed_keys.data(), 16, 16 * K, p.data(), score_stride, false);
          matmul(count, n_padded, K, d, K, 1, transposed_values.data(), 16, 16 * K, ds.data(), score_stride, false);
          for (int64_t i = 0; i < count; ++i) {
            __m256 product = _mm256_setzero_ps();
            for (int64_t j = 0; j < K; j += 8)
              product = _mm256_fmadd_ps(_mm256_loadu_ps(o + i * O + j), _mm256_loadu_ps(d + i * K + j), product);
            const __m256 delta = _mm256_set1_ps(sum(product)), factor = _mm256_set1_ps(scale);
            const __m256 shift = _mm256_set1_ps(logsumexp[(b * s.H + h) * T + first + i]);
            const int64_t from = s.segment_starts ? s.segment_starts[b * T + first + i] : 0;
            for (int64_t j = 0; j < n_padded; j += 8) {
              const __m256 visible = range_mask(from, first + i + 1, j);
              __m256 probability = exponential(_mm256_fmsub_ps(_mm256_loadu_ps(&p[i * score_stride + j]), factor, shift));
              probability = _mm256_and_ps(probability, visible);
              const __m256 dscore = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(&ds[i * score_stride + j]), delta), factor);
              _mm256_storeu_ps(&p[i * score_stride + j], probability);
              _mm256_storeu_ps(&ds[i * score_stride + j], _mm256_mul_ps(probability, dscore));
            }
          }
          matmul(n, K, count, p.data(), 1, score_stride, d, K, 16, dv.data(), K, true);
          matmul(count, K, n, ds.data(), score_stride, 1, packed_keys.data(), 16, 16 * T, &dq[first * K], K, false);
          matmul(n, K, count, ds.data(), 1, score_stride, &q[first * K], K, 16, dk.data(), K, true);
        }
        store_head_grad(s, qkv, b, h * K, s.query_weight, dq.data(), dqkv, &query_partials[task * K]);
      }
      store_head_grad(s, qkv, b, (s.H + g) * K, s.key_weight, dk.data(), dqkv, &key_partials[task * K]);
      for (int64_t t = 0; t < T; ++t)
        std::memcpy(drows + t * W + (s.H + s.G + g) * K, &dv[t * K], K * sizeof(float));
    }
  }
  if (s.query_weight) reduce_partials(query_partials, s.B * s.G, K, dquery_weight);
  if (s.key_weight) reduce_partials(key_partials, s.B * s.G, K, dkey_weight);
}

// total = x + branch (x itself without a branch) and y = norm(total); rows [N, D].
void nextword_add_norm_forward(
    int64_t threads, int64_t N, int64_t D, float eps, const float* x, const float* branch, const float* weight,
    const float* bias, float* total, float* y) {
  const Norm norm{weight, bias, D, eps};
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < N; ++r) {
    const float* from = x + r * D;
    if (branch) {
      for (int64_t i = 0; i < D; i += 8)
        _mm256_storeu_ps(total + r * D + i, _mm256_add_ps(_mm256_loadu_ps(from + i), _mm256_loadu_ps(branch + r * D + i)));
      from = total + r * D;
    }
    norm.forward(from, y + r * D);
  }
}

// dx from dy and from dtotal, the gradient of the sum itself (or null); dweight and dbias [D].
void nextword_add_norm_backward(
    int64_t threads, int64_t N, int64_t D, float eps, const float* total, const float* weight, const float* bias,
    const float* dy, const float* dtotal, float* dx, float* dweight, float* dbias) {
  const Norm norm{weight, bias, D, eps};
  const int64_t chunks = (N + NORM_GRAD_CHUNK - 1) / NORM_GRAD_CHUNK;
  std::vector<float> weight_partials(chunks * D), bias_partials(bias ? chunks * D : 0);
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t r = c * NORM_GRAD_CHUNK; r < std::min(N, (c + 1) * NORM_GRAD_CHUNK); ++r) {
      if (dtotal) std::memcpy(dx + r * D, dtotal + r * D, D * sizeof(float));
      norm.backward(
          total + r * D, dy + r * D, dx + r * D, dtotal, &weight_partials[c * D], bias ? &bias_partials[c * D] : nullptr);
    }
  reduce_partials(weight_partials, chunks, D, dweight);
  if (bias) reduce_partials(bias_partials, chunks, D, dbias);
}

enum Activation : int64_t { SWIGLU, RELU, GELU };

// y [N, F] of x: [N, 2F], gate and up projection side by side, for SwiGLU; [N, F] otherwise.
void nextword_activation_forward(int64_t threads, int64_t kind, int64_t N, int64_t F, const float* x, float* y) {
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

void nextword_activation_backward(int64_t threads, int64_t kind, int64_t N, int64_t F, const float* x, const float* dy, float* dx) {
  const int64_t width = kind == SWIGLU ? 2 * F : F;
  const __m256 one = _mm256_set1_ps(1.0f);
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < N; ++r)
    for (int64_t i = 0; i < F; i += 8) {
      const __m256 a = _mm256_loadu_ps(x + r * width + i), d = _mm256_loadu_ps(dy + r * F + i);
      float* to = dx + r * width + i;
      if (kind == SWIGLU) {
        const __m256 s = sigmoid(a), up = _mm256_loadu_ps(x + r * width + F + i);
        const __m256 derivative = _mm256_mul_ps(s, _mm256_fmadd_ps(a, _mm256_sub_ps(one, s), one));
        _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_mul_ps(d, up), derivative));
        _mm256_storeu_ps(to + F, _mm256_mul_ps(d, _mm256_mul_ps(a, s)));
      } else if (kind == RELU) {
        _mm256_storeu_ps(to, _mm256_and_ps(d, _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ)));
      } else {
        const __m256 square = _mm256_mul_ps(a, a), cube = _mm256_set1_ps(GELU_CUBE), steep = _mm256_set1_ps(GELU_SLOPE);
        const __m256 s = sigmoid(_mm256_mul_ps(_mm256_fmadd_ps(_mm256_mul_ps(square, a), cube, a), steep));
        const __m256 inner = _mm256_mul_ps(steep, _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(3.0f), cube), square, one));
        const __m256 derivative = _mm256_fmadd_ps(_mm256_mul_ps(a, _mm256_mul_ps(s, _mm256_sub_ps(one, s))), inner, s);
        _mm256_storeu_ps(to, _mm256_mul_ps(d, derivative));
      }
    }
}

// losses [N] = -log softmax(logits)[target] of each row, in nats; the logits are replaced by their gradients. A negative target has
// no loss.
void nextword_cross_entropy_with_grad(int64_t threads, int64_t N, int64_t V, const int64_t* targets, float* logits, float* losses) {
  const __m256 minus_infinity = _mm256_set1_ps(-INFINITY);
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < N; ++r) {
    float* x = logits + r * V;
    if (targets[r] < 0) {
      std::fill(x, x + V, 0.0f);
      losses[r] = 0;
      continue;
    }
    const int64_t vector_end = V / 8 * 8;
    const __m256i tail_mask = lanes(V - vector_end);
    __m256 maximum = minus_infinity;
    for (int64_t i = 0; i < vector_end; i += 8) maximum = _mm256_max_ps(maximum, _mm256_loadu_ps(x + i));
    if (vector_end < V) maximum = _mm256_max_ps(maximum, _mm256_blendv_ps(minus_infinity, _mm256_maskload_ps(x + vector_end, tail_mask), _mm256_castsi256_ps(tail_mask)));
    const float max_logit = largest(maximum), target_logit = x[targets[r]];
    const __m256 shift = _mm256_set1_ps(max_logit);
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < vector_end; i += 8) {
      const __m256 value = exponential(_mm256_sub_ps(_mm256_loadu_ps(x + i), shift));
      _mm256_storeu_ps(x + i, value);
      total = _mm256_add_ps(total, value);
    }
    if (vector_end < V) {
      __m256 value = exponential(_mm256_sub_ps(_mm256_maskload_ps(x + vector_end, tail_mask), shift));
      value = _mm256_and_ps(value, _mm256_castsi256_ps(tail_mask));
      _mm256_maskstore_ps(x + vector_end, tail_mask, value);
      total = _mm256_add_ps(total, value);
    }
    const float all = sum(total);
    const __m256 inverse = _mm256_set1_ps(1 / all);
    for (int64_t i = 0; i < vector_end; i += 8) _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
    for (int64_t i = vector_end; i < V; ++i) x[i] /= all;
    x[targets[r]] -= 1;
    losses[r] = max_logit + std::log(all) - target_logit;
  }
}

// sums [N] = log Σ e^x of each row of logits [N, V].
void nextword_logsumexp(int64_t threads, int64_t N, int64_t V, const float* logits, float* sums) {
  const __m256 minus_infinity = _mm256_set1_ps(-INFINITY);
  const int64_t vector_end = V / 8 * 8;
  const __m256i tail_mask = lanes(V - vector_end);
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < N; ++r) {
    const float* x = logits + r * V;
    __m256 maximum = minus_infinity, total = _mm256_setzero_ps();
    for (int64_t i = 0; i < vector_end; i += 8) maximum = _mm256_max_ps(maximum, _mm256_loadu_ps(x + i));
    const __m256 last = _mm256_blendv_ps(minus_infinity, vector_end < V ? _mm256_maskload_ps(x + vector_end, tail_mask) : minus_infinity, _mm256_castsi256_ps(tail_mask));
    const float max_logit = largest(_mm256_max_ps(maximum, last));
    const __m256 shift = _mm256_set1_ps(max_logit);
    for (int64_t i = 0; i < vector_end; i += 8) total = _mm256_add_ps(total, exponential(_mm256_sub_ps(_mm256_loadu_ps(x + i), shift)));
    total = _mm256_add_ps(total, _mm256_and_ps(exponential(_mm256_sub_ps(last, shift)), _mm256_castsi256_ps(tail_mask)));
    sums[r] = max_logit + std::log(sum(total));
  }
}
}
