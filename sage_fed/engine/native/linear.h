// Activations in the form that a linear layer wants, and the product itself.
#pragma once

#include "model.h"
#include "pool.h"
#include "tile.h"

namespace sf {

// Rows of activations for layers of one kind: fp32, bf16, or int8 with a scale per 32.
struct Activations {
  uint8_t* rows = nullptr;
  int64_t stride = 0;  // bytes
  GroupScale* groups = nullptr;
  int64_t group_stride = 0;
  int64_t k = 0;
  int32_t kind = kBf16;

  bool quantised() const { return kind == kInt8 || kind == kInt4; }
  int64_t width() const { return round_up(k, kGroup); }
  static int64_t stride_for(int32_t kind, int64_t k) {
    const int64_t each = kind == kFp32 ? 4 : kind == kBf16 ? 2 : 1;
    return round_up(round_up(k, kGroup) * each, 64) + 64;  // off powers of two
  }
};

// Converts x [k] to row `row`; with `norm` [k] as its root-mean-square normalisation.
void prepare_row(const Activations& to, int64_t row, const float* x, const float* norm, float eps);

// Stores 32 activations, from a multiple of 32 on.
void store_group(const Activations& to, int64_t row, int64_t first, __m512 low, __m512 high);

enum class Then { kStore, kAdd, kGate };

// What becomes of a product: stored or added to `out`, or gated into `gated` (silu(gate) * up).
struct Output {
  Then then;
  float* out = nullptr;
  int64_t stride = 0;   // of `out`, in floats
  int64_t columns = 0;  // that may be written; rows of an Activations are padded to panels
  const Activations* gated = nullptr;
};

// Tasks of a product, for Team::share.
int64_t product_tasks(const Linear& layer, int64_t columns);

// One task; `scratch` holds 64 floats a row.
void product_task(const Linear& layer, const Activations& a, int64_t rows, int64_t task,
                  float* scratch, const Output& output);

// Row `row` of the weights, dequantised, to x [k].
void weight_row(const Linear& layer, int64_t row, float* x);

// Packs `count` rows of [n, k] from `first_row` on.
void pack_rows(Team& team, const Linear& layer, int64_t first_row, int64_t count,
               const void* source, int32_t source_type);

}  // namespace sf
