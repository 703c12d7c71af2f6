// A whole GPT over some rows, each a token at a place of a text: what native.py compiles, and says how to call.
//
// A row's numbers depend on that row and on the keys and values of its own text alone: every sum is taken in one order,
// whatever else is computed beside it. So a text alone and in company, read at once or in pieces, is the same to the last bit.
//
// Letters as in model/gpt.py: D model width, H heads, G key-value heads, K width of a head, F feed-forward width, V vocabulary.

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
  const float *weight, *bias;  // no weight: left out; no bias: RMSNorm
};

struct Layer {
  Norm attention_norm, feed_forward_norm, query_norm, key_norm;
  Matrix query, key, value, output, up, gate, down;
};

struct Model {
  int64_t n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, context_length, activation, post_norm;
  float eps, unused;
  const float *positions, *cosines, *sines;  // a table [context, D], or two [context, K/2]; those that are not used are null
  Norm final_norm;
  Matrix embedding, head;
  const Layer* layers;
};

// Where the keys and values are: [n_layers, slots, G, room, K] each.
struct Cache {
  float *keys, *values;
  int64_t slots, room;
};
}

namespace {

// ---------------------------------------------------------------- the parts

void normalise(const Norm& norm, float eps, const float* x, int64_t n, float* out) {
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

// softmax(q Kᵀ / √K) V of one query over `length` positions; `weights` has room for them, rounded up to 8.
void attend(const float* q, const float* keys, const float* values, int64_t length, int64_t width, float* weights, float* out) {
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  float most = -INFINITY;
  for (int64_t s = 0; s < length; ++s) {
    __m256 acc = _mm256_setzero_ps();
    for (int64_t k = 0; k < width; k += 8)
      acc = _mm256_fmadd_ps(_mm256_loadu_ps(q + k), _mm256_loadu_ps(keys + s * width + k), acc);
    weights[s] = sum(acc) * scale;
    most = std::max(most, weights[s]);
  }
  for (int64_t s = length; s < (length + 7) / 8 * 8; ++s) weights[s] = -INFINITY;
  __m256 total = _mm256_setzero_ps();
  for (int64_t s = 0; s < length; s += 8) {
    __m256 x = _mm256_loadu_ps(weights + s);
    __m256 known = _mm256_cmp_ps(x, _mm256_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    x = _mm256_and_ps(exponential(_mm256_sub_ps(x, _mm256_set1_ps(most))), known);
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
  if (m.kind == FLOAT32) {
    std::memcpy(out, static_cast<const float*>(m.data) + token * m.in, m.in * sizeof(float));
    return;
  }
  const int64_t n = padded(m.in);
  for (int64_t i = 0; i < m.in; ++i) {
    if (m.kind == INT8) {
      out[i] = static_cast<const int8_t*>(m.data)[token * n + i] * static_cast<const float*>(m.scale)[token];
    } else {
      uint8_t both = static_cast<const uint8_t*>(m.data)[token * n / 2 + i / 32 * 16 + i % 16];
      int weight = (i % 32 < 16 ? both & 15 : both >> 4) - 8;
      out[i] = weight * _cvtsh_ss(static_cast<const uint16_t*>(m.scale)[(token * n + i) / 32]);
    }
  }
}

// Memory that begins where a line of the cache does, so that no vector lies across two.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

// What a pass holds for its rows, kept from one to the next.
struct Scratch {
  std::vector<float, Aligned<float>> x, normed, query, key, value, heads, up, gate, scales, weights;
  std::vector<int16_t, Aligned<int16_t>> integers;
  std::vector<int32_t, Aligned<int32_t>> starts;
};

}  // namespace

extern "C" {

void* nextword_scratch() { return new Scratch; }
void nextword_free(void* scratch) { delete static_cast<Scratch*>(scratch); }

// Run the model over `rows` rows: row i is token tokens[i] at position positions[i] of the text in slot slots[i]. Its key and
// value are written to the cache before any row looks at them; it sees its text's positions up to its own. Then
// logits[j, V] are those of row wanted[j].
void nextword_pass(
    const Model* model, const Cache* cache, void* memory, int64_t threads, int64_t rows, const int64_t* tokens,
    const int64_t* positions, const int64_t* slots, int64_t n_wanted, const int64_t* wanted, float* logits) {
  const Model& c = *model;
  Scratch& s = *static_cast<Scratch*>(memory);
  const int64_t D = c.d_model, K = c.head_dim, H = c.n_heads, G = c.n_kv_heads, F = c.d_ff;
  const int64_t widest = std::max({D, H * K, F}), room = (c.context_length + 7) / 8 * 8, stride_integers = padded(widest, 128);
  s.x.resize(rows * D), s.normed.resize(rows * D), s.query.resize(rows * H * K), s.key.resize(rows * G * K);
  s.value.resize(rows * G * K), s.heads.resize(rows * H * K), s.up.resize(rows * F), s.gate.resize(rows * F);
  s.scales.resize(rows), s.integers.resize(rows * stride_integers), s.starts.resize(rows * stride_integers / 8), s.weights.resize(threads * room);
  float* x = s.x.data();

#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    auto share = [&](int64_t n, int64_t who) { return n / 8 * who / all * 8 + (who == all ? n % 8 : 0); };
    auto rows_here = [&](auto work) {
      for (int64_t r = rows * me / all; r < rows * (me + 1) / all; ++r) work(r);
    };
    // This thread's share of a product's outputs.
    auto multiply = [&](const Matrix& m, const Input& in, int64_t n, auto put) {
      product(m, in, n, share(m.out, me), share(m.out, me + 1), put);
    };
    auto store = [&](float* out, int64_t stride) {
      return [out, stride](int64_t o, int64_t r, float v) { out[r * stride + o] = v; };
    };
    auto add = [&](int64_t o, int64_t r, float v) { x[r * D + o] += v; };
    auto as_input = [&](const float* values, int64_t stride) {
      return Input{values, s.integers.data(), s.scales.data(), s.starts.data(), stride, stride_integers};
    };
    auto prepare = [&](const Matrix& m, const float* values, int64_t n, int64_t r) {
      if (m.kind == FLOAT32) return;
      quantise(values + r * n, n, &s.integers[r * stride_integers], &s.scales[r]);
      if (m.kind == INT4) turn(&s.integers[r * stride_integers], n, &s.starts[r * stride_integers / 8]);
    };
    // The rows as a layer takes them: normed first, or after the last addition.
    auto begin_half = [&](const Norm& norm, const Matrix& next) {
      rows_here([&](int64_t r) {
        if (c.post_norm) std::memcpy(&s.normed[r * D], x + r * D, D * sizeof(float));
        else normalise(norm, c.eps, x + r * D, D, &s.normed[r * D]);
        prepare(next, s.normed.data(), D, r);
      });
#pragma omp barrier
    };
    auto end_half = [&](const Norm& norm) {
#pragma omp barrier
      if (c.post_norm) rows_here([&](int64_t r) { normalise(norm, c.eps, x + r * D, D, x + r * D); });
    };

    rows_here([&](int64_t r) {
      embed(c.embedding, tokens[r], x + r * D);
      if (c.positions)
        for (int64_t i = 0; i < D; ++i) x[r * D + i] += c.positions[positions[r] * D + i];
    });
    for (int64_t l = 0; l < c.n_layers; ++l) {
      const Layer& layer = c.layers[l];
      begin_half(layer.attention_norm, layer.query);
      const Input normed = as_input(s.normed.data(), D);
      multiply(layer.query, normed, rows, store(s.query.data(), H * K));
      multiply(layer.key, normed, rows, store(s.key.data(), G * K));
      multiply(layer.value, normed, rows, store(s.value.data(), G * K));
#pragma omp barrier
      auto place = [&](int64_t r, int64_t g) { return (((l * cache->slots + slots[r]) * G + g) * cache->room) * K; };
      auto turn = [&](const Norm& norm, float* head, int64_t r) {
        if (norm.weight) normalise(norm, c.eps, head, K, head);
        if (c.cosines) rotate(head, c.cosines + positions[r] * K / 2, c.sines + positions[r] * K / 2, K / 2);
      };
      rows_here([&](int64_t r) {
        for (int64_t h = 0; h < H; ++h) turn(layer.query_norm, &s.query[(r * H + h) * K], r);
        for (int64_t g = 0; g < G; ++g) {
          turn(layer.key_norm, &s.key[(r * G + g) * K], r);
          const int64_t at = place(r, g) + positions[r] * K;
          std::memcpy(cache->keys + at, &s.key[(r * G + g) * K], K * sizeof(float));
          std::memcpy(cache->values + at, &s.value[(r * G + g) * K], K * sizeof(float));
        }
      });
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < rows * H; ++i) {
        const int64_t r = i / H, h = i % H, at = place(r, h * G / H);
        attend(&s.query[i * K], cache->keys + at, cache->values + at, positions[r] + 1, K, &s.weights[me * room], &s.heads[i * K]);
      }
      rows_here([&](int64_t r) { prepare(layer.output, s.heads.data(), H * K, r); });
#pragma omp barrier
      multiply(layer.output, as_input(s.heads.data(), H * K), rows, add);
      end_half(layer.attention_norm);
      begin_half(layer.feed_forward_norm, layer.up);
      multiply(layer.up, normed, rows, store(s.up.data(), F));
      if (c.activation == SWIGLU) multiply(layer.gate, normed, rows, store(s.gate.data(), F));
      const int64_t first = share(F, me), last = share(F, me + 1);
      for (int64_t r = 0; r < rows; ++r) activate(c.activation, &s.up[r * F + first], &s.gate[r * F + first], last - first);
#pragma omp barrier
      if (layer.down.kind != FLOAT32) {
        rows_here([&](int64_t r) { prepare(layer.down, s.up.data(), F, r); });
#pragma omp barrier
      }
      multiply(layer.down, as_input(s.up.data(), F), rows, add);
      end_half(layer.feed_forward_norm);
    }
#pragma omp barrier
    for (int64_t j = n_wanted * me / all; j < n_wanted * (me + 1) / all; ++j) {
      const float* from = x + wanted[j] * D;
      if (c.final_norm.weight) normalise(c.final_norm, c.eps, from, D, &s.normed[j * D]);
      else std::memcpy(&s.normed[j * D], from, D * sizeof(float));
      prepare(c.head, s.normed.data(), D, j);
    }
#pragma omp barrier
    multiply(c.head, as_input(s.normed.data(), D), n_wanted, store(logits, c.head.out));
  }
}
}
