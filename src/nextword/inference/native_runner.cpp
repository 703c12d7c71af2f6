// The forward pass of a GPT over rows, each a token at a position of a sequence; compiled and called by model_runner.py.
//
// The result of a row depends only on that row and on the keys and values of its own sequence: every sum is taken in one order,
// whatever else is computed beside it. A sequence is therefore equal to the last bit alone and in a batch, at once and in chunks.
//
// Shapes as in model/gpt.py: D model width, H query heads, G key-value heads, K width of a head, F feed-forward width, V
// vocabulary.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "products.h"
#include "vectors.h"

enum Activation : int64_t { SWIGLU, RELU, GELU };

extern "C" {

struct Norm {
  const float *weight, *bias;  // no weight: no norm; no bias: RMSNorm
};

struct Layer {
  Norm attention_norm, feed_forward_norm, query_norm, key_norm;
  Matrix query, key, value, output, up, gate, down;
};

struct Model {
  int64_t n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, context_length, activation, post_norm;
  float eps, padding;
  const float *position_table, *cos, *sin;  // [context, D], or rotary [context, K/2] each; null if unused
  Norm final_norm;
  Matrix embedding, head;
  const Layer* layers;
};

// The KV cache: keys and values, [n_layers, slots, G, capacity, K] each.
struct Cache {
  float *keys, *values;
  int64_t slots, capacity;
};
}

namespace {

// ---------------------------------------------------------------- operators

void normalize(const Norm& norm, float eps, const float* x, int64_t n, float* out) {
  __m256 mean = _mm256_setzero_ps();
  if (norm.bias) {
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) total = _mm256_add_ps(total, _mm256_loadu_ps(x + i));
    mean = _mm256_set1_ps(sum(total) / n);
  }
  __m256 squares = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 8) {
    __m256 d = _mm256_sub_ps(_mm256_loadu_ps(x + i), mean);
    squares = _mm256_fmadd_ps(d, d, squares);
  }
  const __m256 inverse = _mm256_set1_ps(1 / std::sqrt(sum(squares) / n + eps));
  for (int64_t i = 0; i < n; i += 8) {
    __m256 y = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), mean), inverse);
    y = _mm256_mul_ps(y, _mm256_loadu_ps(norm.weight + i));
    if (norm.bias) y = _mm256_add_ps(y, _mm256_loadu_ps(norm.bias + i));
    _mm256_storeu_ps(out + i, y);
  }
}

void activate(int64_t kind, float* up, const float* gate, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    __m256 x = _mm256_loadu_ps(up + i);
    if (kind == RELU) {
      x = _mm256_max_ps(x, _mm256_setzero_ps());
    } else if (kind == SWIGLU) {
      __m256 g = _mm256_loadu_ps(gate + i);
      x = _mm256_mul_ps(x, _mm256_mul_ps(g, sigmoid(g)));
    } else {
      __m256 cube = _mm256_mul_ps(_mm256_mul_ps(x, x), x);
      __m256 z = _mm256_fmadd_ps(cube, _mm256_set1_ps(GELU_CUBE), x);
      x = _mm256_mul_ps(x, sigmoid(_mm256_mul_ps(z, _mm256_set1_ps(GELU_SLOPE))));
    }
    _mm256_storeu_ps(up + i, x);
  }
}

// softmax(q Kᵀ / √K) V of one query over `length` positions; `weights` is scratch memory for them, rounded up to 8.
void attend(const float* q, const float* keys, const float* values, int64_t length, int64_t width, float* weights, float* out) {
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  float max_score = -INFINITY;
  for (int64_t s = 0; s < length; ++s) {
    __m256 acc = _mm256_setzero_ps();
    for (int64_t k = 0; k < width; k += 8)
      acc = _mm256_fmadd_ps(_mm256_loadu_ps(q + k), _mm256_loadu_ps(keys + s * width + k), acc);
    weights[s] = sum(acc) * scale;
    max_score = std::max(max_score, weights[s]);
  }
  for (int64_t s = length; s < (length + 7) / 8 * 8; ++s) weights[s] = -INFINITY;
  __m256 total = _mm256_setzero_ps();
  for (int64_t s = 0; s < length; s += 8) {
    __m256 x = _mm256_loadu_ps(weights + s);
    __m256 valid = _mm256_cmp_ps(x, _mm256_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    x = _mm256_and_ps(exponential(_mm256_sub_ps(x, _mm256_set1_ps(max_score))), valid);
    _mm256_storeu_ps(weights + s, x);
    total = _mm256_add_ps(total, x);
  }
  const __m256 inverse = _mm256_set1_ps(1 / sum(total));
  for (int64_t k = 0; k < width; k += 8) {
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    int64_t s = 0;
    for (; s + 2 <= length; s += 2) {
      even = _mm256_fmadd_ps(_mm256_set1_ps(weights[s]), _mm256_loadu_ps(values + s * width + k), even);
      odd = _mm256_fmadd_ps(_mm256_set1_ps(weights[s + 1]), _mm256_loadu_ps(values + (s + 1) * width + k), odd);
    }
    if (s < length) even = _mm256_fmadd_ps(_mm256_set1_ps(weights[s]), _mm256_loadu_ps(values + s * width + k), even);
    _mm256_storeu_ps(out + k, _mm256_mul_ps(_mm256_add_ps(even, odd), inverse));
  }
}

void embed(const Matrix& m, int64_t token, float* out) {
  if (m.precision == FLOAT32) {
    std::memcpy(out, static_cast<const float*>(m.data) + token * m.in_features, m.in_features * sizeof(float));
    return;
  }
  const int64_t n = round_up(m.in_features);
  for (int64_t i = 0; i < m.in_features; ++i) {
    if (m.precision == INT8) {
      out[i] = static_cast<const int8_t*>(m.data)[token * n + i] * static_cast<const float*>(m.scale)[token];
    } else {
      uint8_t pair = static_cast<const uint8_t*>(m.data)[token * n / 2 + i / 32 * 16 + i % 16];
      int weight = (i % 32 < 16 ? pair & 15 : pair >> 4) - 8;
      out[i] = weight * _cvtsh_ss(static_cast<const uint16_t*>(m.scale)[(token * n + i) / 32]);
    }
  }
}

// Memory aligned to cache lines, so that no vector crosses two.
template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const AlignedAllocator&) const { return true; }
  bool operator!=(const AlignedAllocator&) const { return false; }
};

// Intermediate results of a forward pass; the memory is reused by the next one.
struct Scratch {
  std::vector<float, AlignedAllocator<float>> x, normed, query, key, value, heads, up, gate, scales, weights;
  std::vector<int16_t, AlignedAllocator<int16_t>> integers;
  std::vector<int32_t, AlignedAllocator<int32_t>> zero_point_sums;
};

}  // namespace

extern "C" {

void* nextword_scratch_new() { return new Scratch; }
void nextword_scratch_free(void* scratch) { delete static_cast<Scratch*>(scratch); }

// Runs the model over `rows` rows: row i is token tokens[i] at position positions[i] of the sequence in slot slots[i]. Keys and
// values are written to the cache before any row attends to them; a row attends to its sequence up to its own position.
// logits[j, V] are those of row output_rows[j].
void nextword_forward(
    int64_t threads, const Model* model, const Cache* cache, void* memory, int64_t rows, const int64_t* tokens,
    const int64_t* positions, const int64_t* slots, int64_t n_outputs, const int64_t* output_rows, float* logits) {
  const Model& c = *model;
  Scratch& s = *static_cast<Scratch*>(memory);
  const int64_t D = c.d_model, K = c.head_dim, H = c.n_heads, G = c.n_kv_heads, F = c.d_ff;
  const int64_t widest = std::max({D, H * K, F}), score_stride = (c.context_length + 7) / 8 * 8, int_stride = round_up(widest, 128);
  s.x.resize(rows * D), s.normed.resize(rows * D), s.query.resize(rows * H * K), s.key.resize(rows * G * K);
  s.value.resize(rows * G * K), s.heads.resize(rows * H * K), s.up.resize(rows * F), s.gate.resize(rows * F);
  s.scales.resize(rows), s.integers.resize(rows * int_stride), s.zero_point_sums.resize(rows * int_stride / 8), s.weights.resize(threads * score_stride);
  float* x = s.x.data();

#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
    // The first of n outputs that a thread computes; multiples of 8.
    auto thread_bound = [&](int64_t n, int64_t t) { return n / 8 * t / n_threads * 8 + (t == n_threads ? n % 8 : 0); };
    auto for_each_local_row = [&](auto work) {
      for (int64_t r = rows * thread / n_threads; r < rows * (thread + 1) / n_threads; ++r) work(r);
    };
    // This thread's outputs of a matrix product.
    auto multiply = [&](const Matrix& m, const QuantizedInput& in, int64_t n, auto store_output) {
      matmul(m, in, n, thread_bound(m.out_features, thread), thread_bound(m.out_features, thread + 1), store_output);
    };
    auto store = [&](float* out, int64_t stride) {
      return [out, stride](int64_t o, int64_t r, float v) { out[r * stride + o] = v; };
    };
    auto add = [&](int64_t o, int64_t r, float v) { x[r * D + o] += v; };
    auto as_input = [&](const float* values, int64_t stride) {
      return QuantizedInput{values, s.integers.data(), s.scales.data(), s.zero_point_sums.data(), stride, int_stride};
    };
    auto quantize_row = [&](const Matrix& m, const float* values, int64_t n, int64_t r) {
      if (m.precision == FLOAT32) return;
      quantize(values + r * n, n, &s.integers[r * int_stride], &s.scales[r]);
      if (m.precision == INT4) interleave_int4(&s.integers[r * int_stride], n, &s.zero_point_sums[r * int_stride / 8]);
    };
    // The input of a residual branch, and the norm after its addition with post-norm.
    auto begin_branch = [&](const Norm& norm, const Matrix& next) {
      for_each_local_row([&](int64_t r) {
        if (c.post_norm) std::memcpy(&s.normed[r * D], x + r * D, D * sizeof(float));
        else normalize(norm, c.eps, x + r * D, D, &s.normed[r * D]);
        quantize_row(next, s.normed.data(), D, r);
      });
#pragma omp barrier
    };
    auto end_branch = [&](const Norm& norm) {
#pragma omp barrier
      if (c.post_norm) for_each_local_row([&](int64_t r) { normalize(norm, c.eps, x + r * D, D, x + r * D); });
    };

    for_each_local_row([&](int64_t r) {
      embed(c.embedding, tokens[r], x + r * D);
      if (c.position_table)
        for (int64_t i = 0; i < D; ++i) x[r * D + i] += c.position_table[positions[r] * D + i];
    });
    for (int64_t l = 0; l < c.n_layers; ++l) {
      const Layer& layer = c.layers[l];
      begin_branch(layer.attention_norm, layer.query);
      const QuantizedInput normed = as_input(s.normed.data(), D);
      multiply(layer.query, normed, rows, store(s.query.data(), H * K));
      multiply(layer.key, normed, rows, store(s.key.data(), G * K));
      multiply(layer.value, normed, rows, store(s.value.data(), G * K));
#pragma omp barrier
      auto cache_offset = [&](int64_t r, int64_t g) { return (((l * cache->slots + slots[r]) * G + g) * cache->capacity) * K; };
      auto norm_and_rotate = [&](const Norm& norm, float* head, int64_t r) {
        if (norm.weight) normalize(norm, c.eps, head, K, head);
        if (c.cos) rotate(head, c.cos + positions[r] * K / 2, c.sin + positions[r] * K / 2, K / 2);
      };
      for_each_local_row([&](int64_t r) {
        for (int64_t h = 0; h < H; ++h) norm_and_rotate(layer.query_norm, &s.query[(r * H + h) * K], r);
        for (int64_t g = 0; g < G; ++g) {
          norm_and_rotate(layer.key_norm, &s.key[(r * G + g) * K], r);
          const int64_t at = cache_offset(r, g) + positions[r] * K;
          std::memcpy(cache->keys + at, &s.key[(r * G + g) * K], K * sizeof(float));
          std::memcpy(cache->values + at, &s.value[(r * G + g) * K], K * sizeof(float));
        }
      });
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < rows * H; ++i) {
        const int64_t r = i / H, h = i % H, at = cache_offset(r, h * G / H);
        attend(&s.query[i * K], cache->keys + at, cache->values + at, positions[r] + 1, K, &s.weights[thread * score_stride], &s.heads[i * K]);
      }
      for_each_local_row([&](int64_t r) { quantize_row(layer.output, s.heads.data(), H * K, r); });
#pragma omp barrier
      multiply(layer.output, as_input(s.heads.data(), H * K), rows, add);
      end_branch(layer.attention_norm);
      begin_branch(layer.feed_forward_norm, layer.up);
      multiply(layer.up, normed, rows, store(s.up.data(), F));
      if (c.activation == SWIGLU) multiply(layer.gate, normed, rows, store(s.gate.data(), F));
      const int64_t first = thread_bound(F, thread), last = thread_bound(F, thread + 1);
      for (int64_t r = 0; r < rows; ++r) activate(c.activation, &s.up[r * F + first], &s.gate[r * F + first], last - first);
#pragma omp barrier
      if (layer.down.precision != FLOAT32) {
        for_each_local_row([&](int64_t r) { quantize_row(layer.down, s.up.data(), F, r); });
#pragma omp barrier
      }
      multiply(layer.down, as_input(s.up.data(), F), rows, add);
      end_branch(layer.feed_forward_norm);
    }
#pragma omp barrier
    for (int64_t j = n_outputs * thread / n_threads; j < n_outputs * (thread + 1) / n_threads; ++j) {
      const float* source = x + output_rows[j] * D;
      if (c.final_norm.weight) normalize(c.final_norm, c.eps, source, D, &s.normed[j * D]);
      else std::memcpy(&s.normed[j * D], source, D * sizeof(float));
      quantize_row(c.head, s.normed.data(), D, j);
    }
#pragma omp barrier
    multiply(c.head, as_input(s.normed.data(), D), n_outputs, store(logits, c.head.out_features));
  }
}
}
