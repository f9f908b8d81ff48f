// Attention of rows of queries over the paged cache.
#pragma once

#include "linear.h"

namespace sf {

// A run of rows of one sequence against some KV heads, with all query heads that share them.
struct AttentionTask {
  int64_t chunk;      // of the step
  int64_t first_row;  // of the batch
  int64_t num_rows;
  int64_t start;      // position of the first row
  int64_t out_row;    // where the first row's result goes
  int32_t kv_head;    // the first
  int32_t num_kv_heads;
};

// Floats that attend() needs for a task of `num_rows`.
int64_t attention_scratch(const Model& model, int64_t num_rows, int64_t num_kv_heads);

// Normalises (Qwen3), rotates and stores the keys and stores the values of a row.
void store_kv(const Model& model, const Layer& layer, const float* qkv, int64_t position,
              int64_t slot, int32_t kv_head);

// Fills `out` [rows of the batch, heads * head_dim]. With `store` the task's only row stores its
// own key and value first. `qkv` has `qkv_stride` floats a row. `spare` takes fp32 rows where a
// head is no whole number of groups; the caller converts them afterwards.
void attend(const Model& model, const Layer& layer, const Step& step, const AttentionTask& task,
            const float* qkv, int64_t qkv_stride, bool store, float* scratch,
            const Activations& out, float* spare);

// Whether attend() needs `spare`.
inline bool needs_spare(const Model& model, int32_t kind) {
  return (kind == kInt8 || kind == kInt4) && model.head_dim % kGroup != 0;
}

// Rows of queries that share a task.
int64_t attention_rows(const Model& model);

inline int64_t slot_of(const Model& model, const Step& step, const Chunk& chunk, int64_t position) {
  return step.blocks[chunk.first_block + position / model.block_size] * model.block_size +
         position % model.block_size;
}

}  // namespace sf
