// Vector functions that the compiled operators share: sums and functions of eight float32 numbers (AVX2), and integer products in
// the widest vectors of the machine (AVX-512 with VNNI, or AVX2).

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

using std::int64_t;

inline float sum(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline int32_t sum(__m256i x) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

inline float largest(__m256 x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// e^x with x = n ln 2 + r, and e^r by its Taylor series up to r^6 (|r| < 0.35: relative error 1e-7).
inline __m256 exponential(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-87.0f), _mm256_min_ps(_mm256_set1_ps(88.0f), x));  // in this order NaN stays NaN
  __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  // ln 2 in two parts, the first exact
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 y = _mm256_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
  __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

inline __m256 sigmoid(__m256 x) {
  __m256 one = _mm256_set1_ps(1.0f);
  return _mm256_div_ps(one, _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

// A mask of the first n of eight lanes.
inline __m256i lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Rotates each pair (x_i, x_{i + half}) by an angle, or with direction -1 by its negative.
inline void rotate(float* x, const float* cosine, const float* sine, int64_t half, float direction = 1) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i], s = direction * sine[i];
    x[i] = first * cosine[i] - second * s;
    x[half + i] = second * cosine[i] + first * s;
  }
}

constexpr float GELU_SLOPE = 1.5957691216f, GELU_CUBE = 0.044715f;  // gelu(x) = x sigmoid(2 √(2/π) (x + 0.044715 x³))

// ---------------------------------------------------------------- integer products in the widest vectors

#ifdef __AVX512VNNI__

using Floats = __m512;
using Integers = __m512i;
constexpr int PAIRS = 32;  // 16-bit integers in a vector

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats as_floats(Integers x) { return _mm512_cvtepi32_ps(x); }
inline float sum(Floats x) { return sum(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1))); }

inline Integers no_integers() { return _mm512_setzero_si512(); }
inline Integers loaded(const int16_t* p) { return _mm512_loadu_si512(p); }
inline Integers loaded(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Integers widened(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Integers added(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
inline int32_t sum(Integers x) { return sum(_mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1))); }

// sums += a · b, added in pairs.
inline void add_products(Integers& sums, Integers a, Integers b) { sums = _mm512_dpwssd_epi32(sums, a, b); }

// int4 weights: a vector of GROUPS groups of 32 (or `groups` of them, then zeros), the V-th four bits of each word, and the scales
// of the groups, each in the four lanes of its words.
constexpr int GROUPS = 4;
inline Integers loaded(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Integers loaded(const uint8_t* p, int64_t groups) { return _mm512_maskz_loadu_epi32((1u << 4 * groups) - 1, p); }
template <int V>
inline Integers quarter(Integers words) { return _mm512_and_si512(_mm512_srli_epi16(words, 4 * V), _mm512_set1_epi16(15)); }
inline Floats four_times(__m128i halves) {
  const __m256i places = _mm256_setr_epi8(
      0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 6, 7, 6, 7, 6, 7);
  return _mm512_cvtph_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(halves), places));
}
inline Floats scales(const uint16_t* p) { return four_times(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline Floats scales(const uint16_t* p, int64_t groups) { return four_times(_mm_maskz_loadu_epi16((1u << groups) - 1, p)); }

#else

using Floats = __m256;
using Integers = __m256i;
constexpr int PAIRS = 16;

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats as_floats(Integers x) { return _mm256_cvtepi32_ps(x); }

inline Integers no_integers() { return _mm256_setzero_si256(); }
inline Integers loaded(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Integers loaded(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Integers widened(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Integers added(Integers a, Integers b) { return _mm256_add_epi32(a, b); }

// sums += a · b, added in pairs. In assembly, because GCC compiles the intrinsics to two loads and a move for each product (half
// as much again, measured).
inline __attribute__((always_inline)) void add_products(Integers& sums, Integers a, Integers b) {
  Integers products;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(a), "x"(b));
}

constexpr int GROUPS = 2;  // the rest as above
inline Integers loaded(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Integers loaded(const uint8_t* p, int64_t) {  // one group
  return _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), 0);
}
template <int V>
inline Integers quarter(Integers words) { return _mm256_and_si256(_mm256_srli_epi16(words, 4 * V), _mm256_set1_epi16(15)); }
inline Floats four_times(int32_t halves) {
  const __m128i places = _mm_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3);
  return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_cvtsi32_si128(halves), places));
}
inline Floats scales(const uint16_t* p) { return four_times(p[0] | p[1] << 16); }
inline Floats scales(const uint16_t* p, int64_t) { return four_times(p[0]); }

#endif
