#include "linear.h"

#include <algorithm>
#include <cmath>

namespace sf {
namespace {

// Weights that are worked on at once: small enough for L2 beside what is fetched meanwhile.
constexpr int64_t kBlockNbytes = 128 * 1024;
constexpr int64_t kLargeBlockNbytes = 256 * 1024;  // of many rows: the sums cross memory less often
constexpr int64_t kManyRows = 64;

// Blocks of equal size, because while one is worked on as much is fetched of the next.
int64_t even(int64_t count, int64_t most) {
  const int64_t blocks = (count + most - 1) / most;
  return round_up((count + blocks - 1) / blocks, 4);
}

void multiply(const Linear& layer, const Activations& a, int64_t rows, const uint8_t* w, float* c) {
  const int64_t block_nbytes = rows > kManyRows ? kLargeBlockNbytes : kBlockNbytes;
  const int64_t most = a.quantised() ? kQuantisedTile : kMaxTile;
  const int64_t tiles = std::min((rows + most - 1) / most, kAheadTiles);
  if (a.quantised()) {
    const int64_t group_nbytes = layer.kind == kInt8 ? kGroup * kPanel : int4_group_nbytes();
    const int64_t num_groups = padded_k(layer) / kGroup;
    const int64_t each = even(num_groups, block_nbytes / group_nbytes);
    const int64_t lines = tiles == 1 ? 0 : (group_nbytes / 64 + tiles - 1) / tiles;
    for (int64_t g = 0; g < num_groups; g += each) {
      const int64_t count = std::min(each, num_groups - g);
      const uint8_t* block = w + g * group_nbytes;
      const Ahead ahead{block + count * group_nbytes, lines};
      const auto run = layer.kind == kInt8 ? quantised_rows<false> : quantised_rows<true>;
      run(block, a.rows + g * kGroup, a.stride, a.groups + g, a.group_stride, rows, count, c, g > 0,
          ahead);
    }
    return;
  }
  const int64_t steps = layer.kind == kBf16 ? padded_k(layer) / 2 : padded_k(layer);
  const int64_t each = even(steps, block_nbytes / (kPanel * 4));
  const int64_t lines = tiles == 1 ? 0 : (16 + tiles - 1) / tiles;
  for (int64_t s = 0; s < steps; s += each) {
    const int64_t count = std::min(each, steps - s);
    const uint8_t* block = w + s * kPanel * 4;
    const Ahead ahead{block + count * kPanel * 4, lines};
    const auto run = layer.kind == kBf16 ? float_rows<DotBf16> : float_rows<DotFp32>;
    run(block, a.rows + s * 4, a.stride, rows, count, c, s > 0, ahead);
  }
}

inline __m512 finished(const Linear& layer, int64_t column, const float* c) {
  __m512 x = _mm512_load_ps(c);
  if (layer.kind == kInt8) x = _mm512_mul_ps(x, _mm512_load_ps(layer.scales + column));
  if (layer.bias != nullptr) x = _mm512_add_ps(x, _mm512_load_ps(layer.bias + column));
  return x;
}

// GCC's reductions of a maximum are fine; this one also works on the absolute values.
inline float largest(__m512 low, __m512 high) {
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
}

}  // namespace

void store_group(const Activations& to, int64_t row, int64_t first, __m512 low, __m512 high) {
  uint8_t* at = to.rows + row * to.stride;
  if (to.kind == kFp32) {
    _mm512_store_ps(reinterpret_cast<float*>(at) + first, low);
    _mm512_store_ps(reinterpret_cast<float*>(at) + first + 16, high);
    return;
  }
  if (to.kind == kBf16) {
    _mm512_store_si512(at + first * 2, fp32_to_bf16(low, high));
    return;
  }
  const float most = largest(low, high), inverse = most > 0 ? 127.0f / most : 0.0f;
  const __m512 by = _mm512_set1_ps(inverse);
  const __m512i i0 = _mm512_cvtps_epi32(_mm512_mul_ps(low, by));
  const __m512i i1 = _mm512_cvtps_epi32(_mm512_mul_ps(high, by));
  _mm_store_si128(reinterpret_cast<__m128i*>(at + first), _mm512_cvtsepi32_epi8(i0));
  _mm_store_si128(reinterpret_cast<__m128i*>(at + first + 16), _mm512_cvtsepi32_epi8(i1));
  const int32_t total = _mm512_reduce_add_epi32(_mm512_add_epi32(i0, i1));
  to.groups[row * to.group_stride + first / kGroup] = {most / 127.0f,
                                                       total * (to.kind == kInt8 ? -128 : -8)};
}

void prepare_row(const Activations& to, int64_t row, const float* x, const float* norm, float eps) {
  const int64_t k = to.k;
  float factor = 1.0f;
  if (norm != nullptr) {
    __m512 squares[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                         _mm512_setzero_ps()};
    for (int64_t i = 0, v = 0; i < k; i += 16, ++v) {
      const __m512 part = _mm512_maskz_loadu_ps(first_lanes(k - i), x + i);
      squares[v % 4] = _mm512_fmadd_ps(part, part, squares[v % 4]);
    }
    const __m512 total = _mm512_add_ps(_mm512_add_ps(squares[0], squares[1]),
                                       _mm512_add_ps(squares[2], squares[3]));
    factor = 1.0f / std::sqrt(_mm512_reduce_add_ps(total) / float(k) + eps);
  }
  const __m512 by = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < to.width(); i += kGroup) {
    __m512 part[2];
    for (int h = 0; h < 2; ++h) {
      const int64_t at = i + h * 16;
      const __mmask16 lanes = first_lanes(k - at);
      part[h] = _mm512_maskz_loadu_ps(lanes, x + at);
      if (norm != nullptr)
        part[h] = _mm512_mul_ps(_mm512_mul_ps(part[h], by), _mm512_maskz_loadu_ps(lanes, norm + at));
    }
    store_group(to, row, i, part[0], part[1]);
  }
}

int64_t product_tasks(const Linear& layer, int64_t columns) {
  return std::min(num_panels(layer), (columns + kPanel - 1) / kPanel);
}

void product_task(const Linear& layer, const Activations& a, int64_t rows, int64_t task,
                  float* scratch, const Output& output) {
  multiply(layer, a, rows, layer.data + task * panel_nbytes(layer), scratch);
  const int64_t first = task * kPanel;
  for (int64_t m = 0; m < rows; ++m) {
    const float* c = scratch + m * kPanel;
    if (output.then == Then::kGate) {
      __m512 gated[2];
      for (int h = 0; h < 2; ++h) {
        const __m512 gate = finished(layer, first + h * 32, c + h * 32);
        const __m512 up = finished(layer, first + h * 32 + 16, c + h * 32 + 16);
        gated[h] = _mm512_mul_ps(silu_ps(gate), up);
      }
      store_group(*output.gated, m, task * (kPanel / 2), gated[0], gated[1]);
      continue;
    }
    for (int v = 0; v < 4; ++v) {
      const int64_t column = first + v * 16;
      const __mmask16 lanes = first_lanes(output.columns - column);
      float* out = output.out + m * output.stride + column;
      __m512 x = finished(layer, column, c + v * 16);
      if (output.then == Then::kAdd) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(lanes, out));
      _mm512_mask_storeu_ps(out, lanes, x);
    }
  }
}

}  // namespace sf
