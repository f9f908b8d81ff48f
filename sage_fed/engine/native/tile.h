// Register tiles: a few rows of activations times one packed panel of 64 columns.
//
// A step is one dword of every row against one dword of every column: a product and a sum in
// fp32, two in bf16, four in int8. Results lie in `c` [rows][64], added to what is there or not.
// `ahead` is fetched towards L2 while the tiles compute, so that memory keeps streaming while
// several tiles work on the same weights.
#pragma once

#include "model.h"
#include "simd.h"

namespace sf {

constexpr int64_t kAheadTiles = 16;  // the tiles that share the fetching of what comes next

struct GroupScale {
  float scale;         // of the group's activations
  int32_t correction;  // minus the weights' zero-point times the sum of the activations
};

struct Ahead {
  const uint8_t* from;
  int64_t lines;  // every four steps of fp32 or bf16, every group of int8 or int4

  void fetch() {
    for (int64_t i = 0; i < lines; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1);
      from += 64;
    }
  }
};

struct DotBf16 {
  static inline __m512 step(__m512 sum, __m512i w, __m512i a) {
    return dot_bf16(sum, w, a);
  }
};

struct DotFp32 {
  static inline __m512 step(__m512 sum, __m512i w, __m512i a) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(a), sum);
  }
};

inline __m512i dword_of(const uint8_t* a) {
  int32_t value;
  std::memcpy(&value, a, 4);
  return _mm512_set1_epi32(value);
}

template <class Dot, int MT>
inline __attribute__((always_inline)) void float_step(__m512 (&sum)[MT][4], const uint8_t* w,
                                                      const uint8_t* a, int64_t a_stride) {
  const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
  const __m512i w2 = _mm512_load_si512(w + 128), w3 = _mm512_load_si512(w + 192);
#pragma GCC unroll 6
  for (int m = 0; m < MT; ++m) {
    const __m512i x = dword_of(a + m * a_stride);
    sum[m][0] = Dot::step(sum[m][0], w0, x);
    sum[m][1] = Dot::step(sum[m][1], w1, x);
    sum[m][2] = Dot::step(sum[m][2], w2, x);
    sum[m][3] = Dot::step(sum[m][3], w3, x);
  }
}

template <class Dot, int MT>
void float_tile(const uint8_t* w, const uint8_t* a, int64_t a_stride, int64_t steps, float* c,
                bool accumulate, Ahead ahead) {
  __m512 sum[MT][4];
#pragma GCC unroll 6
  for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sum[m][v] = accumulate ? _mm512_load_ps(c + m * kPanel + v * 16) : _mm512_setzero_ps();
  int64_t s = 0;
  for (; s + 4 <= steps; s += 4, w += 1024, a += 16) {
    ahead.fetch();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) float_step<Dot, MT>(sum, w + i * 256, a + i * 4, a_stride);
  }
  for (; s < steps; ++s, w += 256, a += 4) float_step<Dot, MT>(sum, w, a, a_stride);
#pragma GCC unroll 6
  for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_store_ps(c + m * kPanel + v * 16, sum[m][v]);
}

// Rows of any number, in tiles as even as can be.
template <class Dot>
inline void float_rows(const uint8_t* w, const uint8_t* a, int64_t a_stride, int64_t rows,
                       int64_t steps, float* c, bool accumulate, Ahead ahead) {
  const int64_t tiles = (rows + kMaxTile - 1) / kMaxTile;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, count = rows * (t + 1) / tiles - begin;
    const uint8_t* at = a + begin * a_stride;
    float* to = c + begin * kPanel;
    switch (count) {
      case 1: float_tile<Dot, 1>(w, at, a_stride, steps, to, accumulate, ahead); break;
      case 2: float_tile<Dot, 2>(w, at, a_stride, steps, to, accumulate, ahead); break;
      case 3: float_tile<Dot, 3>(w, at, a_stride, steps, to, accumulate, ahead); break;
      case 4: float_tile<Dot, 4>(w, at, a_stride, steps, to, accumulate, ahead); break;
      case 5: float_tile<Dot, 5>(w, at, a_stride, steps, to, accumulate, ahead); break;
      default: float_tile<Dot, 6>(w, at, a_stride, steps, to, accumulate, ahead); break;
    }
    ahead.from += (steps + 3) / 4 * ahead.lines * 64;
    if (t >= kAheadTiles - 1) ahead.lines = 0;  // all of it has been asked for
  }
}

// int8 (u8 weights, zero-point 128) and int4 (nibbles, zero-point 8, bf16 scales in the stream).
// The products of a group are exact in int32; every row needs two sums, hence at most three rows.
template <int MT, bool kNibbles>
void quantised_tile(const uint8_t* w, const uint8_t* a, int64_t a_stride, const GroupScale* groups,
                    int64_t group_stride, int64_t num_groups, float* c, bool accumulate, Ahead ahead) {
  __m512 sum[MT][4];
#pragma GCC unroll 3
  for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sum[m][v] = accumulate ? _mm512_load_ps(c + m * kPanel + v * 16) : _mm512_setzero_ps();
  const __m512i low = _mm512_set1_epi8(0x0f);
  for (int64_t g = 0; g < num_groups; ++g) {
    ahead.fetch();
    __m512i dot[MT][4];
#pragma GCC unroll 3
    for (int m = 0; m < MT; ++m) {
      const __m512i correction = _mm512_set1_epi32(groups[m * group_stride + g].correction);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) dot[m][v] = correction;
    }
    if constexpr (kNibbles) {
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        __m512i lo[4], hi[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const __m512i both = _mm512_load_si512(w + s * 256 + v * 64);
          lo[v] = _mm512_and_si512(both, low);
          hi[v] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
#pragma GCC unroll 3
        for (int m = 0; m < MT; ++m) {
          const __m512i x = dword_of(a + m * a_stride + s * 8);
          const __m512i y = dword_of(a + m * a_stride + s * 8 + 4);
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            dot[m][v] = _mm512_dpbusd_epi32(dot[m][v], lo[v], x);
            dot[m][v] = _mm512_dpbusd_epi32(dot[m][v], hi[v], y);
          }
        }
      }
    } else {
#pragma GCC unroll 8
      for (int s = 0; s < 8; ++s) {
        __m512i u[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) u[v] = _mm512_load_si512(w + s * 256 + v * 64);
#pragma GCC unroll 3
        for (int m = 0; m < MT; ++m) {
          const __m512i x = dword_of(a + m * a_stride + s * 4);
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) dot[m][v] = _mm512_dpbusd_epi32(dot[m][v], u[v], x);
        }
      }
    }
    __m512 scale[4];
    if constexpr (kNibbles) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        scale[v] = bf16_to_fp32(_mm256_load_si256(reinterpret_cast<const __m256i*>(w + 1024 + v * 32)));
    }
#pragma GCC unroll 3
    for (int m = 0; m < MT; ++m) {
      const __m512 x = _mm512_set1_ps(groups[m * group_stride + g].scale);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m512 by = kNibbles ? _mm512_mul_ps(scale[v], x) : x;
        sum[m][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][v]), by, sum[m][v]);
      }
    }
    w += kNibbles ? 1152 : 2048;
    a += kGroup;
  }
#pragma GCC unroll 3
  for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_store_ps(c + m * kPanel + v * 16, sum[m][v]);
}

template <bool kNibbles>
inline void quantised_rows(const uint8_t* w, const uint8_t* a, int64_t a_stride,
                           const GroupScale* groups, int64_t group_stride, int64_t rows,
                           int64_t num_groups, float* c, bool accumulate, Ahead ahead) {
  const int64_t tiles = (rows + kQuantisedTile - 1) / kQuantisedTile;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, count = rows * (t + 1) / tiles - begin;
    const auto run = count == 1   ? quantised_tile<1, kNibbles>
                     : count == 2 ? quantised_tile<2, kNibbles>
                                  : quantised_tile<3, kNibbles>;
    run(w, a + begin * a_stride, a_stride, groups + begin * group_stride, group_stride, num_groups,
        c + begin * kPanel, accumulate, ahead);
    ahead.from += num_groups * ahead.lines * 64;
    if (t >= kAheadTiles - 1) ahead.lines = 0;
  }
}

}  // namespace sf
