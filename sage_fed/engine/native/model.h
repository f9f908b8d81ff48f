// The plain-C description of a model and of a step: what Python and C++ agree on.
//
// Every struct here is mirrored by a ctypes.Structure in library.py; sf_abi_sizes() lets Python
// check that the two still agree. Nothing here owns memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sf {

constexpr int kPanel = 64;   // output features in one packed panel: four vectors of 16
constexpr int kGroup = 32;   // input features that share one activation scale
constexpr int kMaxTile = 6;        // rows of activations in one register tile
constexpr int kQuantisedTile = 3;  // of int8 and int4

enum Kind : int32_t { kBf16 = 0, kInt8 = 1, kInt4 = 2, kFp32 = 3 };
enum SourceType : int32_t { kSrcBf16 = 0, kSrcFp16 = 1, kSrcFp32 = 2 };

// A packed linear layer. Panels of 64 outputs follow one another; within a panel the inputs
// advance in dwords (fp32: 1 input, bf16: 2, int8: 4) and each step holds the dwords of the 64
// outputs. int4: per group of 32 inputs four steps of 8 nibbles, then 64 bf16 scales.
// In a gated layer outputs [0, n/2) and [n/2, n) are interleaved by 16.
struct Linear {
  uint8_t* data;
  float* scales;  // int8: one per packed output; else null
  float* bias;    // one per packed output; null where there is none
  int64_t n, k;
  int32_t kind;
  int32_t gated;
};

struct Layer {
  Linear qkv, out, gate_up, down;
  const float* input_norm;
  const float* mlp_norm;
  const float* q_norm;  // null where queries and keys are not normalised
  const float* k_norm;
  void* kv;  // [slots, 2 * kv_heads * head_dim]
};

struct Model {
  int32_t num_layers, num_heads, num_kv_heads, head_dim;
  int64_t hidden, intermediate;
  int64_t valid_ids;  // logits that are wanted
  float eps;
  int32_t block_size;  // tokens in a KV block
  float alone_us;      // a step that takes one thread less than this gets one thread only
  int32_t fp32;        // 1: KV cache and attention in fp32, else bf16
  int32_t embedding_type;
  const void* embedding;  // [vocab, hidden]; null: rows of `head`
  const float* norm;
  const float* rotary;  // [positions, 2, head_dim]: cosines, signed sines
  const Layer* layers;
  Linear head;
};

// One chunk: `num_rows` consecutive tokens of one sequence, from position `start`.
struct Chunk {
  int64_t start;
  int64_t num_rows;
  int64_t first_block;  // into Step::blocks
  int64_t draws;        // logits of so many of its last rows are wanted
};

struct Step {
  const int64_t* token_ids;
  const Chunk* chunks;
  const int64_t* blocks;
  int64_t num_tokens, num_chunks;
  float* logits;  // [draws, valid_ids]
  int64_t* best;  // [draws]: the first id of the highest logit; -1: no numbers
};

// How one row's token is drawn; see sampling.py for what each means.
struct DrawRow {
  uint64_t key;
  double top_p;
  int64_t top_k;
  float temperature;  // 0: the best
  float log_min_p;
};

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
inline int64_t padded_k(const Linear& l) { return round_up(l.k, kGroup); }
inline int64_t panels(const Linear& l) { return (l.n + kPanel - 1) / kPanel; }
// Packed outputs: a gated layer pads each half to 32, so that a panel holds 32 of either.
inline int64_t num_panels(const Linear& l) {
  return l.gated ? (l.n / 2 + kPanel / 2 - 1) / (kPanel / 2) : panels(l);
}
inline int64_t int4_group_nbytes() { return kGroup / 8 * kPanel * 4 + kPanel * 2; }
inline int64_t panel_nbytes(const Linear& l) {
  const int64_t k = padded_k(l);
  switch (l.kind) {
    case kBf16: return k * kPanel * 2;
    case kInt8: return k * kPanel;
    case kInt4: return k / kGroup * int4_group_nbytes();
    default: return k * kPanel * 4;
  }
}
// Where output row `row` lies among the packed outputs.
inline int64_t packed_column(const Linear& l, int64_t row) {
  if (!l.gated) return row;
  const int64_t half = l.n / 2, up = row >= half, r = up ? row - half : row;
  return r / 32 * 64 + r % 32 / 16 * 32 + up * 16 + r % 16;
}

}  // namespace sf
