#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace sf {
namespace {

constexpr int64_t kKeys = 64;     // that are scored at once
constexpr int64_t kQueries = 112;  // about as many vectors of queries as share a task

// How the cache and the operands of attention are stored: a dword holds kPack elements.
struct Bf16 {
  using Element = uint16_t;
  using Dot = DotBf16;
  static constexpr int kExpDegree = 4;  // beyond what bf16 weights can tell
  static constexpr int64_t kPack = 2;
  static void store(uint8_t* to, __mmask16 lanes, __m512 x) {
    _mm256_mask_storeu_epi16(to, lanes, fp32_to_bf16(x));
  }
};

struct Fp32 {
  using Element = float;
  using Dot = DotFp32;
  static constexpr int kExpDegree = 6;
  static constexpr int64_t kPack = 1;
  static void store(uint8_t* to, __mmask16 lanes, __m512 x) {
    _mm512_mask_storeu_ps(reinterpret_cast<float*>(to), lanes, x);
  }
};

// Normalises (where `norm` is) and rotates one head of `dim` into `to`.
template <class T>
void rotate_head(const Model& model, const float* head, const float* norm, int64_t position, uint8_t* to) {
  const int64_t dim = model.head_dim, half = dim / 2;
  const float* cos = model.rotary + position * 2 * dim;
  const float* sin = cos + dim;
  float factor = 1.0f;
  if (norm != nullptr) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < dim; i += 16) {
      const __m512 x = _mm512_maskz_loadu_ps(first_lanes(dim - i), head + i);
      squares = _mm512_fmadd_ps(x, x, squares);
    }
    factor = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(dim) + model.eps);
  }
  const __m512 by = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 lanes = first_lanes(half - i);
    __m512 low = _mm512_maskz_loadu_ps(lanes, head + i);
    __m512 high = _mm512_maskz_loadu_ps(lanes, head + half + i);
    if (norm != nullptr) {
      low = _mm512_mul_ps(_mm512_mul_ps(low, by), _mm512_maskz_loadu_ps(lanes, norm + i));
      high = _mm512_mul_ps(_mm512_mul_ps(high, by), _mm512_maskz_loadu_ps(lanes, norm + half + i));
    }
    const auto table = [lanes](const float* at) { return _mm512_maskz_loadu_ps(lanes, at); };
    const __m512 first = _mm512_fmadd_ps(low, table(cos + i), _mm512_mul_ps(high, table(sin + i)));
    const __m512 second =
        _mm512_fmadd_ps(high, table(cos + half + i), _mm512_mul_ps(low, table(sin + half + i)));
    T::store(to + i * sizeof(typename T::Element), lanes, first);
    T::store(to + (half + i) * sizeof(typename T::Element), lanes, second);
  }
}

template <class T>
uint8_t* cached(const Model& model, const Layer& layer, int64_t slot, int64_t head) {
  const int64_t width = 2 * model.num_kv_heads * model.head_dim;
  return static_cast<uint8_t*>(layer.kv) + (slot * width + head * model.head_dim) * int64_t(sizeof(typename T::Element));
}

template <class T>
void store_row(const Model& model, const Layer& layer, const float* qkv, int64_t position,
               int64_t slot, int32_t kv_head) {
  const int64_t dim = model.head_dim;
  const float* key = qkv + (model.num_heads + kv_head) * dim;
  const float* value = key + model.num_kv_heads * dim;
  rotate_head<T>(model, key, layer.k_norm, position, cached<T>(model, layer, slot, kv_head));
  uint8_t* to = cached<T>(model, layer, slot, model.num_kv_heads + kv_head);
  for (int64_t i = 0; i < dim; i += 16) {
    const __mmask16 lanes = first_lanes(dim - i);
    T::store(to + i * int64_t(sizeof(typename T::Element)), lanes, _mm512_maskz_loadu_ps(lanes, value + i));
  }
}

// Asks for what the next 64 tokens have here, a little at a time; towards L2, because rows lie so
// far apart that they would drive each other out of L1.
inline void fetch(const uint8_t* at, int64_t nbytes) {
  for (int64_t b = 0; b < nbytes; b += 64)
    _mm_prefetch(reinterpret_cast<const char*>(at + b), _MM_HINT_T1);
}

// Keys of up to 64 tokens as a packed panel: [dword of the head][token].
template <class T>
void pack_keys(const uint8_t* const* rows, const uint8_t* const* next, int64_t offset, int64_t count,
               int64_t dwords, uint8_t* panel) {
  for (int64_t t = 0; t < count; t += 16) {
    for (int64_t i = t; i < std::min(t + 16, count); ++i) fetch(next[i] + offset, dwords * 4);
    for (int64_t d = 0; d < dwords; d += 16) {
      const __mmask16 lanes = first_lanes(dwords - d);
      __m512i block[16];
      for (int i = 0; i < 16; ++i)
        block[i] = t + i < count ? _mm512_maskz_loadu_epi32(lanes, rows[t + i] + offset + d * 4) : _mm512_setzero_si512();
      transpose16(block);
      const int64_t used = std::min<int64_t>(16, dwords - d);
      for (int64_t i = 0; i < used; ++i) _mm512_store_si512(panel + (d + i) * 256 + t * 4, block[i]);
    }
  }
}

// Values of up to 64 tokens as panels of 64 elements of the head: [step of tokens][element].
template <class T>
void pack_values(const uint8_t* const* rows, const uint8_t* const* next, int64_t offset, int64_t count,
                 int64_t dim, uint8_t* panels) {
  const int64_t nbytes = dim * int64_t(sizeof(typename T::Element));
  const int64_t panel_nbytes = kKeys / T::kPack * 256;
  for (int64_t t = 0; t < count; t += T::kPack) {
    for (int64_t i = t; i < std::min(t + T::kPack, count); ++i) fetch(next[i] + offset, nbytes);
    uint8_t* to = panels + t / T::kPack * 256;
    for (int64_t d = 0; d < dim; d += 16) {
      const __mmask16 lanes = first_lanes(dim - d);
      uint8_t* at = to + d / kPanel * panel_nbytes + d % kPanel * 4;
      if constexpr (T::kPack == 1) {
        _mm512_store_si512(at, _mm512_maskz_loadu_epi32(lanes, rows[t] + offset + d * 4));
      } else {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, rows[t] + offset + d * 2));
        __m512i b = _mm512_setzero_si512();
        if (t + 1 < count)
          b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, rows[t + 1] + offset + d * 2));
        _mm512_store_si512(at, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
    }
  }
}

// One row of scores [64] to weights: online softmax, to base 2, which `scale` accounts for.
// Returns what older sums shrink by.
template <class T>
float soften(const float* scores, int64_t visible, float scale, float& most, float& total, uint8_t* to) {
  __m512 x[4];
  __m512 highest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int v = 0; v < 4; ++v) {
    const __mmask16 lanes = first_lanes(visible - v * 16);
    x[v] = _mm512_maskz_mul_ps(lanes, _mm512_load_ps(scores + v * 16), _mm512_set1_ps(scale));
    highest = _mm512_mask_max_ps(highest, lanes, highest, x[v]);
  }
  const float before = most;
  most = std::max(before, _mm512_reduce_max_ps(highest));
  const __m512 by = _mm512_set1_ps(most);
  __m512 sum = _mm512_setzero_ps();
  for (int v = 0; v < 4; ++v) {
    const __mmask16 lanes = first_lanes(visible - v * 16);
    const __m512 p = _mm512_maskz_mov_ps(lanes, exp2_ps<T::kExpDegree>(_mm512_sub_ps(x[v], by)));
    sum = _mm512_add_ps(sum, p);
    T::store(to + v * 16 * int64_t(sizeof(typename T::Element)), 0xffff, p);
  }
  const float shrink = before == most ? 1.0f : std::exp2(before - most);
  total = total * shrink + _mm512_reduce_add_ps(sum);
  return shrink;
}

void store_head(const Model& model, const float* sums, int64_t panel_stride, float inverse,
                int64_t row, int64_t head, const Activations& out, float* spare) {
  const int64_t dim = model.head_dim, first = head * dim;
  const __m512 by = _mm512_set1_ps(inverse);
  const auto part = [&](int64_t d) {
    return _mm512_mul_ps(_mm512_load_ps(sums + d / kPanel * panel_stride + d % kPanel), by);
  };
  if (dim % kGroup == 0) {
    for (int64_t d = 0; d < dim; d += kGroup) store_group(out, row, first + d, part(d), part(d + 16));
    return;
  }
  uint8_t* at = out.rows + row * out.stride;
  for (int64_t d = 0; d < dim; d += 16) {
    const __mmask16 lanes = first_lanes(dim - d);
    if (out.kind == kBf16) Bf16::store(at + (first + d) * 2, lanes, part(d));
    else if (out.kind == kFp32) Fp32::store(at + (first + d) * 4, lanes, part(d));
    else _mm512_mask_storeu_ps(spare + row * model.num_heads * dim + first + d, lanes, part(d));
  }
  if (head + 1 < model.num_heads || out.quantised()) return;
  // The product reads whole groups: zero weights times what an earlier step left may be NaN.
  const int64_t each = out.kind == kBf16 ? 2 : 4;
  std::memset(at + (first + dim) * each, 0, size_t((out.width() - first - dim) * each));
}

template <class T>
void attend_as(const Model& model, const Layer& layer, const Step& step, const AttentionTask& task,
               const float* qkv, int64_t qkv_stride, float* scratch,
               const Activations& out, float* spare) {
  constexpr int64_t kEach = sizeof(typename T::Element);
  const Chunk& chunk = step.chunks[task.chunk];
  const int64_t dim = model.head_dim, group = model.num_heads / model.num_kv_heads;
  const int64_t queries = task.num_rows * group, all = queries * task.num_kv_heads;
  const int64_t dwords = dim / T::kPack, value_panels = (dim + kPanel - 1) / kPanel;
  const int64_t value_floats = kKeys / T::kPack * kPanel, sums_floats = queries * value_panels * kPanel;
  const int64_t query_stride = round_up(dim * kEach, 64), weight_stride = kKeys * kEach;
  float* at = scratch;
  const auto take = [&at](int64_t count) { float* mine = at; at += round_up(count, 16); return mine; };
  uint8_t* keys = reinterpret_cast<uint8_t*>(take(dwords * kPanel));
  uint8_t* values = reinterpret_cast<uint8_t*>(take(value_panels * value_floats));
  uint8_t* query = reinterpret_cast<uint8_t*>(take(all * query_stride / 4));
  uint8_t* weights = reinterpret_cast<uint8_t*>(take(queries * weight_stride / 4));
  float* scores = take(queries * kPanel);
  float* sums = take(sums_floats * task.num_kv_heads);
  float* most = take(all);
  float* total = take(all);

  // Queries in the order [KV head][row][head of the group].
  for (int64_t q = 0; q < all; ++q) {
    const int64_t row = q % queries / group, head = (task.kv_head + q / queries) * group + q % group;
    rotate_head<T>(model, qkv + (task.first_row + row) * qkv_stride + head * dim, layer.q_norm,
                   task.start + row, query + q * query_stride);
    most[q] = -std::numeric_limits<float>::infinity();
    total[q] = 0.0f;
  }
  std::memset(sums, 0, size_t(sums_floats * task.num_kv_heads) * 4);

  const float scale = 1.44269504f / std::sqrt(float(dim));  // log2(e): softmax works to base 2
  const int64_t end = task.start + task.num_rows, offset = model.num_kv_heads * dim * kEach;
  const auto rows_from = [&](int64_t t, const uint8_t** rows) {
    const int64_t count = std::max<int64_t>(std::min(kKeys, end - t), 0);
    for (int64_t i = 0; i < count; i += model.block_size) {  // kKeys are whole blocks
      const uint8_t* first = cached<T>(model, layer, slot_of(model, step, chunk, t + i), task.kv_head);
      for (int64_t j = 0; j < std::min<int64_t>(model.block_size, count - i); ++j)
        rows[i + j] = first + j * 2 * offset;
    }
    return count;
  };
  const uint8_t* rows[kKeys];
  const uint8_t* next[kKeys];
  int64_t count = rows_from(0, rows);
  for (int64_t t = 0; t < end; t += kKeys) {
    const int64_t following = rows_from(t + kKeys, next);
    std::copy(rows + following, rows + count, next + following);
    for (int64_t h = 0; h < task.num_kv_heads; ++h) {
      const int64_t here = h * dim * kEach, first = h * queries;
      float* sum = sums + h * sums_floats;
      pack_keys<T>(rows, next, here, count, dwords, keys);
      pack_values<T>(rows, next, offset + here, count, dim, values);
      float_rows<typename T::Dot>(keys, query + first * query_stride, query_stride, queries, dwords,
                                  scores, false, {nullptr, 0});
      for (int64_t q = 0; q < queries; ++q) {
        const int64_t visible = std::min(count, task.start + q / group + 1 - t);
        if (visible <= 0) {
          std::memset(weights + q * weight_stride, 0, size_t(weight_stride));
          continue;
        }
        const float shrink = soften<T>(scores + q * kPanel, visible, scale, most[first + q],
                                       total[first + q], weights + q * weight_stride);
        if (shrink == 1.0f || t == 0) continue;
        for (int64_t p = 0; p < value_panels; ++p)
          for (int64_t v = 0; v < kPanel; v += 16) {
            float* part = sum + (p * queries + q) * kPanel + v;
            _mm512_store_ps(part, _mm512_mul_ps(_mm512_load_ps(part), _mm512_set1_ps(shrink)));
          }
      }
      const int64_t steps = (count + T::kPack - 1) / T::kPack;
      for (int64_t p = 0; p < value_panels; ++p)
        float_rows<typename T::Dot>(values + p * value_floats * 4, weights, weight_stride, queries,
                                    steps, sum + p * queries * kPanel, true, {nullptr, 0});
    }
    std::copy(next, next + following, rows);
    count = following;
  }
  for (int64_t q = 0; q < all; ++q) {
    const int64_t h = q / queries, row = q % queries / group;
    store_head(model, sums + h * sums_floats + q % queries * kPanel, queries * kPanel, 1.0f / total[q],
               task.out_row + row, (task.kv_head + h) * group + q % group, out, spare);
  }
}

}  // namespace

int64_t attention_scratch(const Model& model, int64_t num_rows, int64_t num_kv_heads) {
  // As for fp32, which takes most: keys, values; and of each query itself, its weights, scores, sums.
  const int64_t queries = num_rows * (model.num_heads / model.num_kv_heads);
  const int64_t value_panels = (model.head_dim + kPanel - 1) / kPanel;
  return round_up(model.head_dim, 16) * kPanel + value_panels * kKeys * kPanel +
         queries * (kKeys + kPanel) +
         queries * num_kv_heads * (round_up(model.head_dim, 16) + value_panels * kPanel + 2) + 64;
}

int64_t attention_rows(const Model& model) {
  return std::max<int64_t>(1, kQueries * model.num_kv_heads / model.num_heads);
}

void store_kv(const Model& model, const Layer& layer, const float* qkv, int64_t position,
              int64_t slot, int32_t kv_head) {
  if (model.fp32) store_row<Fp32>(model, layer, qkv, position, slot, kv_head);
  else store_row<Bf16>(model, layer, qkv, position, slot, kv_head);
}

void attend(const Model& model, const Layer& layer, const Step& step, const AttentionTask& task,
            const float* qkv, int64_t qkv_stride, bool store, float* scratch,
            const Activations& out, float* spare) {
  if (store) {
    const int64_t slot = slot_of(model, step, step.chunks[task.chunk], task.start);
    for (int32_t h = task.kv_head; h < task.kv_head + task.num_kv_heads; ++h)
      store_kv(model, layer, qkv + task.first_row * qkv_stride, task.start, slot, h);
  }
  if (model.fp32) attend_as<Fp32>(model, layer, step, task, qkv, qkv_stride, scratch, out, spare);
  else attend_as<Bf16>(model, layer, step, task, qkv, qkv_stride, scratch, out, spare);
}

}  // namespace sf
