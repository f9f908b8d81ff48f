// Checkpoint rows into packed panels, quantised on the way, and single rows back out of them.

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear.h"

namespace sf {
namespace {

constexpr int64_t kRows = 16;  // that are packed together

void load_row(const void* source, int32_t type, int64_t first, int64_t k, float* x) {
  for (int64_t i = 0; i < k; i += 16) {
    const __mmask16 lanes = first_lanes(k - i);
    __m512 part;
    if (type == kSrcFp32) {
      part = _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(source) + first + i);
    } else {
      const __m256i half =
          _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(source) + first + i);
      part = type == kSrcBf16 ? bf16_to_fp32(half) : _mm512_cvtph_ps(half);
    }
    _mm512_mask_storeu_ps(x + i, lanes, part);
  }
}

float largest(const float* x, int64_t count) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16)
    most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(count - i), x + i)));
  return _mm512_reduce_max_ps(most);
}

// The element of a group of 32 that is largest in magnitude, the positive one of two.
float extreme(const float* x) {
  const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  const float highest = _mm512_reduce_max_ps(_mm512_max_ps(low, high));
  const float lowest = _mm512_reduce_min_ps(_mm512_min_ps(low, high));
  return highest >= -lowest ? highest : lowest;
}

// round(x / scale) to nearest even, kept between two limits; zero where the scale is.
__m512i quantised(const float* x, float scale, int32_t lowest, int32_t highest) {
  if (scale == 0.0f) return _mm512_setzero_si512();
  const __m512i q = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x), _mm512_set1_ps(scale)));
  return _mm512_min_epi32(_mm512_max_epi32(q, _mm512_set1_epi32(lowest)), _mm512_set1_epi32(highest));
}

// A row as the dwords of its panel column. `scales`: int8, one; int4, one a group (bf16).
void row_to_dwords(const Linear& layer, const float* x, uint32_t* dwords, float* int8_scale,
                   uint16_t* int4_scales) {
  const int64_t k = padded_k(layer);
  if (layer.kind == kFp32) {
    std::memcpy(dwords, x, size_t(k) * 4);
  } else if (layer.kind == kBf16) {
    for (int64_t i = 0; i < k; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dwords + i / 2), fp32_to_bf16(_mm512_loadu_ps(x + i)));
  } else if (layer.kind == kInt8) {
    const float scale = largest(x, k) / 127.0f;
    *int8_scale = scale;
    for (int64_t i = 0; i < k; i += 16) {
      const __m512i q = _mm512_add_epi32(quantised(x + i, scale, -127, 127), _mm512_set1_epi32(128));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dwords + i / 4), _mm512_cvtepi32_epi8(q));
    }
  } else {
    for (int64_t i = 0; i < k; i += kGroup) {
      const __m256i rounded = fp32_to_bf16(_mm512_set1_ps(extreme(x + i) / -8.0f));
      const uint16_t bits = uint16_t(_mm256_extract_epi16(rounded, 0));
      int4_scales[i / kGroup] = bits;
      alignas(16) uint8_t q[kGroup];
      for (int64_t j = 0; j < kGroup; j += 16) {
        const __m512i part = quantised(x + i + j, bf16_to_fp32(bits), -8, 7);
        _mm_store_si128(reinterpret_cast<__m128i*>(q + j),
                        _mm512_cvtepi32_epi8(_mm512_add_epi32(part, _mm512_set1_epi32(8))));
      }
      uint8_t* to = reinterpret_cast<uint8_t*>(dwords + i / 8);
      for (int64_t s = 0; s < 4; ++s)
        for (int64_t b = 0; b < 4; ++b) to[s * 4 + b] = uint8_t(q[s * 8 + b] | q[s * 8 + 4 + b] << 4);
    }
  }
}

int64_t dwords_of(const Linear& layer) {
  const int64_t k = padded_k(layer);
  return layer.kind == kFp32 ? k : layer.kind == kBf16 ? k / 2 : layer.kind == kInt8 ? k / 4 : k / 8;
}

// Byte offset of step `s` in a panel: int4 panels have their scales between the steps.
int64_t step_offset(const Linear& layer, int64_t s) {
  return layer.kind == kInt4 ? s / 4 * int4_group_nbytes() + s % 4 * 256 : s * 256;
}

void store_scales(const Linear& layer, int64_t column, float int8_scale, const uint16_t* int4_scales) {
  if (layer.kind == kInt8) layer.scales[column] = int8_scale;
  if (layer.kind != kInt4) return;
  uint8_t* panel = layer.data + column / kPanel * panel_nbytes(layer);
  for (int64_t g = 0; g < padded_k(layer) / kGroup; ++g)
    std::memcpy(panel + g * int4_group_nbytes() + 1024 + column % kPanel * 2, int4_scales + g, 2);
}

}  // namespace

void pack_rows(Team& team, const Linear& layer, int64_t first_row, int64_t count,
               const void* source, int32_t source_type) {
  const int64_t k = padded_k(layer), num_dwords = dwords_of(layer);
  const int64_t stride = round_up(num_dwords, 16);
  std::vector<float> x(size_t(k) + 16, 0.0f);
  std::vector<uint32_t> dwords(size_t(stride * kRows), 0);
  std::vector<uint16_t> int4_scales(size_t(k / kGroup));
  team.share((count + kRows - 1) / kRows, [&](int64_t task) {
    const int64_t begin = task * kRows, rows = std::min(kRows, count - begin);
    for (int64_t r = 0; r < rows; ++r) {
      load_row(source, source_type, (begin + r) * layer.k, layer.k, x.data());
      float int8_scale = 0.0f;
      row_to_dwords(layer, x.data(), dwords.data() + r * stride, &int8_scale, int4_scales.data());
      store_scales(layer, packed_column(layer, first_row + begin + r), int8_scale, int4_scales.data());
    }
    const int64_t column = packed_column(layer, first_row + begin);
    const bool together =
        rows == kRows && column % 16 == 0 &&
        packed_column(layer, first_row + begin + kRows - 1) == column + kRows - 1;
    if (together) {
      uint8_t* to = layer.data + column / kPanel * panel_nbytes(layer) + column % kPanel * 4;
      for (int64_t s = 0; s < num_dwords; s += 16) {
        __m512i block[16];
        for (int r = 0; r < 16; ++r) block[r] = _mm512_loadu_si512(dwords.data() + r * stride + s);
        transpose16(block);
        for (int64_t i = 0; i < std::min<int64_t>(16, num_dwords - s); ++i)
          _mm512_stream_si512(reinterpret_cast<__m512i*>(to + step_offset(layer, s + i)), block[i]);
      }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t c = packed_column(layer, first_row + begin + r);
      uint8_t* to = layer.data + c / kPanel * panel_nbytes(layer) + c % kPanel * 4;
      for (int64_t s = 0; s < num_dwords; ++s)
        std::memcpy(to + step_offset(layer, s), dwords.data() + r * stride + s, 4);
    }
  });
  _mm_sfence();
}

void weight_row(const Linear& layer, int64_t row, float* x) {
  const int64_t c = packed_column(layer, row);
  const uint8_t* panel = layer.data + c / kPanel * panel_nbytes(layer);
  const uint8_t* at = panel + c % kPanel * 4;
  for (int64_t s = 0; s < dwords_of(layer); ++s) {
    const uint8_t* from = at + step_offset(layer, s);
    if (layer.kind == kFp32) {
      if (s < layer.k) std::memcpy(x + s, from, 4);
    } else if (layer.kind == kBf16) {
      uint16_t pair[2];
      std::memcpy(pair, from, 4);
      for (int64_t i = 0; i < 2 && s * 2 + i < layer.k; ++i) x[s * 2 + i] = bf16_to_fp32(pair[i]);
    } else if (layer.kind == kInt8) {
      for (int64_t i = 0; i < 4 && s * 4 + i < layer.k; ++i)
        x[s * 4 + i] = float(int(from[i]) - 128) * layer.scales[c];
    } else {
      uint16_t bits;
      std::memcpy(&bits, panel + s / 4 * int4_group_nbytes() + 1024 + c % kPanel * 2, 2);
      for (int64_t i = 0; i < 8 && s * 8 + i < layer.k; ++i) {
        const int nibble = i < 4 ? from[i] & 15 : from[i - 4] >> 4;
        x[s * 8 + i] = float(nibble - 8) * bf16_to_fp32(bits);
      }
    }
  }
}

}  // namespace sf
