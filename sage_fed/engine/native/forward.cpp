// A whole step of a decoder: embedding, layers, head; and the C interface of the library.

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <new>

#include "attention.h"
#include "linear.h"

namespace sf {
namespace {

constexpr int64_t kOwnRows = 4;  // up to so many rows every thread prepares by itself
// What one thread does at most, roughly: weights streamed from a cache, and weights times rows.
constexpr double kCachedBytesPerUs = 50e3;
constexpr double kWorkBytesPerUs = 200e3;
constexpr int64_t kHugePage = int64_t(1) << 21;

// Zeroed memory for the activations of a step.
class Memory {
 public:
  ~Memory() { std::free(data_); }
  // Throws std::bad_alloc; what was there is lost either way.
  void grow(int64_t nbytes) {
    if (nbytes <= size_) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const int64_t size = round_up(nbytes, kHugePage);
    data_ = static_cast<uint8_t*>(std::aligned_alloc(size_t(kHugePage), size_t(size)));
    if (data_ == nullptr) throw std::bad_alloc();
    madvise(data_, size_t(size), MADV_HUGEPAGE);
    std::memset(data_, 0, size_t(size));
    size_ = size;
  }
  uint8_t* data() { return data_; }
  int64_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

// Hands out pieces of a block, 64-byte aligned; with no block it only counts.
class Carver {
 public:
  explicit Carver(uint8_t* data) : data_(data) {}
  template <class T>
  T* take(int64_t count) {
    T* mine = data_ == nullptr ? nullptr : reinterpret_cast<T*>(data_ + used_);
    used_ += round_up(count * int64_t(sizeof(T)), 64) + 64;
    return mine;
  }
  Activations activations(int64_t rows, int64_t k, int32_t kind) {
    Activations a;
    a.k = k;
    a.kind = kind;
    a.stride = Activations::stride_for(kind, k);
    a.rows = take<uint8_t>(rows * a.stride);
    a.group_stride = a.width() / kGroup;
    a.groups = take<GroupScale>(a.quantised() ? rows * a.group_stride : 0);
    return a;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* data_;
  int64_t used_ = 0;
};

struct Best {
  float logit;
  int64_t id;
  void take(float other, int64_t other_id) {
    if (other > logit || (other == logit && other_id < id)) *this = {other, other_id};
  }
};

// The highest of some logits whose first has `first` as its id; where one of them is no number,
// an infinite logit, which nothing beats.
void find_best(const float* logits, int64_t count, int64_t first, Best& best) {
  __m512 highest = _mm512_set1_ps(best.logit);
  __mmask16 no_number = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 some = _mm512_maskz_loadu_ps(first_lanes(count - i), logits + i);
    highest = _mm512_mask_max_ps(highest, first_lanes(count - i), highest, some);
    no_number |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
  }
  if (no_number) return best.take(std::numeric_limits<float>::infinity(), first);
  const float most = _mm512_reduce_max_ps(highest);
  if (!(most >= best.logit)) return;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    const __mmask16 equal =
        _mm512_mask_cmp_ps_mask(lanes, _mm512_maskz_loadu_ps(lanes, logits + i), _mm512_set1_ps(most), _CMP_EQ_OQ);
    if (equal) return best.take(most, first + i + __builtin_ctz(equal));
  }
}

struct Workspace {
  float* x;        // the residual stream [rows, x_stride]
  float* drawn_x;  // of the drawn rows alone
  float* qkv;      // [rows, qkv_stride]
  float* spare;    // attention's output where it is converted afterwards
  Activations attended, gated, shared;
  std::vector<Activations> own;      // of each thread
  std::vector<float*> scratch;       // of each thread, for products
  std::vector<float*> attention;     // of each thread, likewise
  std::vector<Best*> best;           // of each thread, one a drawn row
  std::vector<AttentionTask> tasks;
  std::vector<AttentionTask> last_tasks;  // of the last layer, where only some rows are drawn
  std::vector<int64_t> chunk_of_row;
  std::vector<int64_t> drawn_rows;
};

}  // namespace

class Session {
 public:
  Session(const Model& model, Pool& pool)
      : model_(model), layers_(model.layers, model.layers + model.num_layers), pool_(pool) {
    model_.layers = layers_.data();
    const auto nbytes = [](const Linear& l) { return num_panels(l) * panel_nbytes(l); };
    weight_nbytes_ = nbytes(model_.head);
    for (const Layer& l : layers_)
      weight_nbytes_ += nbytes(l.qkv) + nbytes(l.out) + nbytes(l.gate_up) + nbytes(l.down);
  }

  // Lays out a step, which is copied; what it points to has to stay until `advance` says true. A
  // step that was not finished is forgotten.
  void begin(const Step& step) {
    step_ = step;
    next_layer_ = 0;
    lay_out(step);
  }

  // Goes on with the step: to its end and true, or, where `pause_after_s` >= 0, no further than to
  // the layer by which that time will have passed, at least by one, and false.
  bool advance(double pause_after_s) {
    const double bytes_us = double(weight_nbytes_) / kCachedBytesPerUs;
    const double work_us = double(step_.num_tokens) * double(weight_nbytes_) / kWorkBytesPerUs;
    pauses_ = pause_after_s >= 0.0;
    paused_ = false;
    begun_ = layer_begun_ = Clock::now();
    pause_after_ = std::chrono::duration<double>(pause_after_s);
    pool_.run([&](Team& team, int thread) { work(step_, team, thread); },
              std::max(bytes_us, work_us) < double(model_.alone_us));
    return !paused_;
  }

 private:
  using Clock = std::chrono::steady_clock;

  int64_t query_width() const { return int64_t(model_.num_heads) * model_.head_dim; }

  void carve(Carver& carver, int64_t rows, int64_t drawn) {
    const Layer& layer = model_.layers[0];
    const int64_t hidden = model_.hidden;
    w_.x = carver.take<float>(rows * x_stride());
    w_.drawn_x = carver.take<float>(drawn * x_stride());
    w_.qkv = carver.take<float>(rows * qkv_stride());
    w_.spare = carver.take<float>(needs_spare(model_, layer.out.kind) ? rows * query_width() : 0);
    w_.attended = carver.activations(rows, query_width(), layer.out.kind);
    w_.gated = carver.activations(rows, model_.intermediate, layer.down.kind);
    w_.shared = any_kind(carver, rows, hidden);
    w_.own.resize(size_t(pool_.size()));
    w_.scratch.resize(size_t(pool_.size()));
    w_.attention.resize(size_t(pool_.size()));
    w_.best.resize(size_t(pool_.size()));
    const int64_t together = std::min(rows, attention_rows(model_));
    for (int t = 0; t < pool_.size(); ++t) {
      w_.own[size_t(t)] = any_kind(carver, kOwnRows, hidden);
      w_.scratch[size_t(t)] = carver.take<float>(rows * kPanel);
      w_.best[size_t(t)] = carver.take<Best>(drawn);
      w_.attention[size_t(t)] = carver.take<float>(
          std::max(attention_scratch(model_, together, 1), attention_scratch(model_, 1, model_.num_kv_heads)));
    }
  }

  // Room for activations of every kind: the head's may differ from the layers'.
  static Activations any_kind(Carver& carver, int64_t rows, int64_t k) {
    Activations a = carver.activations(rows, k, kInt8);
    a.stride = Activations::stride_for(kFp32, k);
    a.rows = carver.take<uint8_t>(rows * a.stride);
    return a;
  }

  int64_t x_stride() const { return round_up(model_.hidden, kPanel); }
  int64_t qkv_stride() const { return num_panels(model_.layers[0].qkv) * kPanel; }

  void lay_out(const Step& step) {
    int64_t drawn = 0;
    for (int64_t c = 0; c < step.num_chunks; ++c) drawn += step.chunks[c].draws;
    Carver counting(nullptr);
    carve(counting, step.num_tokens, drawn);
    memory_.grow(counting.used());
    Carver carver(memory_.data());
    carve(carver, step.num_tokens, drawn);
    w_.tasks.clear();
    w_.last_tasks.clear();
    w_.chunk_of_row.clear();
    w_.drawn_rows.clear();
    first_row_.resize(size_t(step.num_chunks));
    alone_ = true;
    const int64_t rows_each = attention_rows(model_);
    // Where rows are plenty, one task reads a token's keys and values of all heads together; few
    // rows are shared out evenly only head by head.
    const int32_t all = model_.num_kv_heads;
    const int32_t heads_of_one = step.num_chunks >= 4 * pool_.size() ? all : 1;
    int64_t row = 0;
    for (int64_t c = 0; c < step.num_chunks; ++c) {
      const Chunk& chunk = step.chunks[c];
      alone_ = alone_ && chunk.num_rows == 1;
      const int32_t heads = chunk.num_rows == 1 ? heads_of_one : 1;
      for (int64_t r = 0; r < chunk.num_rows; r += rows_each)
        for (int32_t head = 0; head < all; head += heads)
          w_.tasks.push_back({c, row + r, std::min(rows_each, chunk.num_rows - r), chunk.start + r, row + r, head, heads});
      w_.chunk_of_row.insert(w_.chunk_of_row.end(), size_t(chunk.num_rows), c);
      first_row_[size_t(c)] = row;
      row += chunk.num_rows;
      const int32_t last_heads = chunk.draws == 1 ? heads_of_one : 1;
      for (int64_t r = chunk.num_rows - chunk.draws; r < chunk.num_rows; r += rows_each) {
        const int64_t at = first_row_[size_t(c)] + r, out = int64_t(w_.drawn_rows.size());
        const int64_t count = std::min(rows_each, chunk.num_rows - r);
        for (int32_t head = 0; head < all; head += last_heads)
          w_.last_tasks.push_back({c, at, count, chunk.start + r, out, head, last_heads});
        for (int64_t i = 0; i < count; ++i) w_.drawn_rows.push_back(at + i);
      }
    }
  }

  // Activations of rows of `x` for a layer of `kind`, ready on return.
  Activations prepared(Team& team, int thread, const float* x, int64_t rows, int32_t kind, const float* norm) {
    Activations to = rows <= kOwnRows ? w_.own[size_t(thread)] : w_.shared;
    to.kind = kind;
    if (rows <= kOwnRows) {
      for (int64_t row = 0; row < rows; ++row) prepare_row(to, row, x + row * x_stride(), norm, model_.eps);
      return to;
    }
    team.share(rows, [&](int64_t row) { prepare_row(to, row, x + row * x_stride(), norm, model_.eps); });
    team.barrier();
    return to;
  }

  void product(Team& team, int thread, const Linear& layer, const Activations& a, int64_t rows,
               const Output& output) {
    team.share(product_tasks(layer, output.then == Then::kGate ? num_panels(layer) * kPanel : output.columns),
               [&](int64_t task) { product_task(layer, a, rows, task, w_.scratch[size_t(thread)], output); });
    team.barrier();
  }

  void embed(const Step& step, int64_t row) {
    float* x = w_.x + row * x_stride();
    const int64_t id = step.token_ids[row], hidden = model_.hidden;
    if (model_.embedding == nullptr) {
      weight_row(model_.head, id, x);
    } else if (model_.embedding_type == kSrcFp32) {
      std::memcpy(x, static_cast<const float*>(model_.embedding) + id * hidden, size_t(hidden) * 4);
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(model_.embedding) + id * hidden;
      for (int64_t i = 0; i < hidden; ++i) x[i] = bf16_to_fp32(from[i]);
    }
  }

  void store(const Step& step, const Layer& layer, Team& team) {
    team.share(step.num_tokens, [&](int64_t row) {
      const int64_t c = w_.chunk_of_row[size_t(row)];
      const Chunk& chunk = step.chunks[c];
      const int64_t position = chunk.start + row - first_row_[size_t(c)];
      const int64_t slot = slot_of(model_, step, chunk, position);
      for (int32_t head = 0; head < model_.num_kv_heads; ++head)
        store_kv(model_, layer, w_.qkv + row * qkv_stride(), position, slot, head);
    });
    team.barrier();
  }

  // Each task first stores its own key and value, with `store_own`.
  void attention(const Step& step, const Layer& layer, Team& team, int thread,
                 const std::vector<AttentionTask>& tasks, int64_t rows, bool store_own) {
    // The last rows of a prompt have most to attend to: they go first.
    const int64_t count = int64_t(tasks.size());
    team.share(count, [&](int64_t task) {
      attend(model_, layer, step, tasks[size_t(count - 1 - task)], w_.qkv, qkv_stride(), store_own,
             w_.attention[size_t(thread)], w_.attended, w_.spare);
    });
    team.barrier();
    if (!needs_spare(model_, layer.out.kind)) return;
    team.share(rows, [&](int64_t row) {
      prepare_row(w_.attended, row, w_.spare + row * query_width(), nullptr, 0.0f);
    });
    team.barrier();
  }

  // What follows attention: x [rows] += out(attended), and then the gated layers.
  void rest(const Layer& layer, Team& team, int thread, float* x, int64_t rows) {
    const Output add{Then::kAdd, x, x_stride(), x_stride(), nullptr};
    product(team, thread, layer.out, w_.attended, rows, add);
    const Activations normed = prepared(team, thread, x, rows, layer.gate_up.kind, layer.mlp_norm);
    product(team, thread, layer.gate_up, normed, rows, {Then::kGate, nullptr, 0, 0, &w_.gated});
    product(team, thread, layer.down, w_.gated, rows, add);
  }

  void head(const Step& step, Team& team, int thread, const float* x, int64_t drawn) {
    const Activations last = prepared(team, thread, x, drawn, model_.head.kind, model_.norm);
    const int64_t ids = model_.valid_ids;
    const Output output{Then::kStore, step.logits, ids, ids, nullptr};
    Best* best = w_.best[size_t(thread)];
    std::fill(best, best + drawn, Best{-std::numeric_limits<float>::infinity(), ids});
    team.share(product_tasks(model_.head, ids), [&](int64_t task) {
      product_task(model_.head, last, drawn, task, w_.scratch[size_t(thread)], output);
      const int64_t first = task * kPanel, count = std::min<int64_t>(kPanel, ids - first);
      for (int64_t row = 0; row < drawn; ++row)
        find_best(step.logits + row * ids + first, count, first, best[row]);
    });
    team.barrier();
    if (thread != 0) return;
    for (int64_t row = 0; row < drawn; ++row) {
      Best found = w_.best[0][row];
      // Of the threads that work on this step: the others have left what an earlier one found.
      for (int t = 1; t < team.size(); ++t) found.take(w_.best[size_t(t)][row].logit, w_.best[size_t(t)][row].id);
      step.best[row] = std::isfinite(found.logit) ? found.id : -1;
    }
  }

  // Whether to leave the rest of the step, from `next` on, for another call; the same on every
  // thread. Between layers all there is of a step is the residual stream and the cache.
  bool pauses_before(int32_t next, Team& team, int thread) {
    if (!pauses_) return false;
    if (thread == 0) {
      // The next layer is taken to be as long as this one.
      const Clock::time_point now = Clock::now();
      paused_ = now + (now - layer_begun_) - begun_ > pause_after_;
      layer_begun_ = now;
      if (paused_) next_layer_ = next;
    }
    team.barrier();
    return paused_;
  }

  void work(const Step& step, Team& team, int thread) {
    const int64_t rows = step.num_tokens, drawn = int64_t(w_.drawn_rows.size());
    const int32_t first = next_layer_;  // thread 0 writes it again only behind a barrier
    if (first == 0) {
      team.share(rows, [&](int64_t row) { embed(step, row); });
      team.barrier();
    }
    float* x = first == model_.num_layers && drawn < rows ? w_.drawn_x : w_.x;
    for (int32_t i = first; i < model_.num_layers; ++i) {
      const Layer& layer = model_.layers[i];
      const Activations normed = prepared(team, thread, x, rows, layer.qkv.kind, layer.input_norm);
      product(team, thread, layer.qkv, normed, rows,
              {Then::kStore, w_.qkv, qkv_stride(), qkv_stride(), nullptr});
      // After the last layer's keys and values only the rows that are drawn from matter.
      const bool some = i + 1 == model_.num_layers && drawn < rows;
      if (some || !alone_) store(step, layer, team);
      if (!some) {
        attention(step, layer, team, thread, w_.tasks, rows, alone_);
        rest(layer, team, thread, x, rows);
        if (pauses_before(i + 1, team, thread)) return;
        continue;
      }
      if (drawn == 0) return;
      x = w_.drawn_x;
      if (thread == 0)
        for (int64_t row = 0; row < drawn; ++row)
          std::memcpy(x + row * x_stride(), w_.x + w_.drawn_rows[size_t(row)] * x_stride(), size_t(x_stride()) * 4);
      attention(step, layer, team, thread, w_.last_tasks, drawn, false);
      rest(layer, team, thread, x, drawn);
      if (pauses_before(i + 1, team, thread)) return;
    }
    if (drawn > 0) head(step, team, thread, x, drawn);
  }

  Model model_;
  std::vector<Layer> layers_;
  Pool& pool_;
  Memory memory_;
  Workspace w_{};
  std::vector<int64_t> first_row_;
  int64_t weight_nbytes_ = 0;
  bool alone_ = true;  // every chunk is one token: each task stores its own key and value
  Step step_{};
  int32_t next_layer_ = 0;  // of `step_`; the number of layers: the head is left
  bool pauses_ = false, paused_ = false;
  Clock::time_point begun_, layer_begun_;
  std::chrono::duration<double> pause_after_{};
};

// Two engines in a process take turns on the cores, so they share their threads.
struct SharedPool {
  std::unique_ptr<Pool> pool;
  int64_t users = 0;
};
std::mutex pools_lock;
std::map<int32_t, SharedPool> pools;

}  // namespace sf

extern "C" {

using namespace sf;

// Sizes of the structs that Python mirrors, in the order of library.py.
void sf_abi_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Linear);
  sizes[1] = sizeof(Layer);
  sizes[2] = sizeof(Model);
  sizes[3] = sizeof(Chunk);
  sizes[4] = sizeof(Step);
  sizes[5] = sizeof(DrawRow);
}

// The process's pool of `num_threads`, shared by all who ask for it; null: no memory or threads.
void* sf_pool_get(int32_t num_threads) {
  try {
    std::lock_guard<std::mutex> lock(pools_lock);
    SharedPool& shared = pools[num_threads];
    if (shared.pool == nullptr) shared.pool = std::make_unique<Pool>(num_threads);
    ++shared.users;
    return shared.pool.get();
  } catch (...) {
    return nullptr;
  }
}

void sf_pool_release(void* pool) {
  std::lock_guard<std::mutex> lock(pools_lock);
  for (auto at = pools.begin(); at != pools.end(); ++at) {
    if (at->second.pool.get() != pool) continue;
    if (--at->second.users == 0) pools.erase(at);
    return;
  }
}

// Reads `nbytes` (a multiple of 256) of memory with every thread; the sum keeps the reads alive.
int32_t sf_read(void* pool, const void* data, int64_t nbytes) {
  constexpr int64_t kPiece = 1 << 20;
  std::atomic<int32_t> total{0};
  static_cast<Pool*>(pool)->run([&](Team& team, int) {
    __m512i sums[4] = {};
    team.share((nbytes + kPiece - 1) / kPiece, [&](int64_t task) {
      const char* at = static_cast<const char*>(data) + task * kPiece;
      const char* end = at + std::min(kPiece, nbytes - task * kPiece);
      for (; at < end; at += 256)
        for (int i = 0; i < 4; ++i) sums[i] = _mm512_add_epi32(sums[i], _mm512_loadu_si512(at + i * 64));
    });
    total += _mm512_reduce_add_epi32(
        _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3])));
  });
  return total;
}

int64_t sf_linear_nbytes(const Linear* layer) { return num_panels(*layer) * panel_nbytes(*layer); }

int64_t sf_linear_columns(const Linear* layer) { return num_panels(*layer) * kPanel; }

// Zeroes what padding leaves: nothing else is ever unwritten.
void sf_linear_clear(const Linear* layer) {
  const int64_t columns = num_panels(*layer) * kPanel, nbytes = panel_nbytes(*layer);
  if (columns != layer->n) std::memset(layer->data + (num_panels(*layer) - 1) * nbytes, 0, size_t(nbytes));
  if (layer->scales != nullptr) std::memset(layer->scales, 0, size_t(columns) * 4);
  if (layer->bias != nullptr) std::memset(layer->bias, 0, size_t(columns) * 4);
}

int32_t sf_linear_pack(void* pool, const Linear* layer, int64_t first_row, int64_t count,
                       const void* source, int32_t source_type) {
  std::atomic<int32_t> failed{0};
  static_cast<Pool*>(pool)->run([&](Team& team, int) {
    try {
      pack_rows(team, *layer, first_row, count, source, source_type);
    } catch (...) {
      failed = 1;
    }
  });
  return failed;
}

void sf_linear_place_bias(const Linear* layer, int64_t first_row, int64_t count, const float* values) {
  for (int64_t i = 0; i < count; ++i) layer->bias[packed_column(*layer, first_row + i)] = values[i];
}

void sf_linear_row(const Linear* layer, int64_t row, float* x) { weight_row(*layer, row, x); }

// y [rows, n] = x [rows, k] W^T + b, for tests and measurements; 1: no memory.
int32_t sf_linear_apply(void* pool, const Linear* layer, const float* x, int64_t rows, float* y) {
  Memory memory;
  std::vector<float*> scratch;
  Pool& threads = *static_cast<Pool*>(pool);
  Activations a;
  try {
    for (int pass = 0; pass < 2; ++pass) {
      Carver carver(memory.data());
      a = carver.activations(rows, layer->k, layer->kind);
      scratch.clear();
      for (int t = 0; t < threads.size(); ++t) scratch.push_back(carver.take<float>(rows * kPanel));
      if (pass == 0) memory.grow(carver.used());
    }
  } catch (...) {
    return 1;
  }
  const Output output{Then::kStore, y, layer->n, layer->n, nullptr};
  threads.run([&](Team& team, int thread) {
    team.share(rows, [&](int64_t row) { prepare_row(a, row, x + row * layer->k, nullptr, 0.0f); });
    team.barrier();
    team.share(product_tasks(*layer, layer->n),
               [&](int64_t task) { product_task(*layer, a, rows, task, scratch[size_t(thread)], output); });
  });
  return 0;
}

void* sf_session_new(const Model* model, void* pool) {
  try {
    return new Session(*model, *static_cast<Pool*>(pool));
  } catch (...) {
    return nullptr;
  }
}

void sf_session_free(void* session) { delete static_cast<Session*>(session); }

// Begins a step, or goes on with the last where `step` is null; see `Session`.
// 0: done. 1: there is no memory for the step. 2: paused.
int32_t sf_session_run(void* session, const Step* step, double pause_after_s) {
  Session& running = *static_cast<Session*>(session);
  try {
    if (step != nullptr) running.begin(*step);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return running.advance(pause_after_s) ? 0 : 2;
}

}  // extern "C"
