// One token a row of logits: filters and Gumbel-max, bit by bit as sampling.py does it.
//
// Floating-point operations that decide anything are rounded one by one: `mul`, `add` and `sub` say
// their rounding, so that no compiler contracts two of them into a fused one.
// Most ids never get noise: a block of logits is skipped where none could win with the highest
// noise, and of the rest the counter's leading zeros bound the noise before any logarithm.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "model.h"
#include "pool.h"
#include "simd.h"

namespace sf {
namespace {

constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
constexpr int64_t kBlock = 64;           // logits that are skipped together
constexpr float kNoiseMax = 22.875f;     // as in sampling.py
constexpr float kNoWeight = -30.6f;      // exp of less, times 2^44, is below 1
constexpr int32_t kFirstBin = 117 << 6;  // of 2^-10 in `bins_of`: 64 bins an octave up to 2^5
constexpr int32_t kLastBin = 960;
constexpr size_t kSorted = 512;          // so few are sorted as they are
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline __m512 mul(__m512 a, __m512 b) { return _mm512_mul_round_ps(a, b, kRound); }
inline __m512 add(__m512 a, __m512 b) { return _mm512_add_round_ps(a, b, kRound); }
inline __m512 sub(__m512 a, __m512 b) { return _mm512_sub_round_ps(a, b, kRound); }
inline __m512 all(float x) { return _mm512_set1_ps(x); }
inline __m512 negated(__m512 x) { return _mm512_xor_ps(x, all(-0.0f)); }

inline void split(__m512 x, __m512& f, __m512& e) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i power = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3F3504F3)), 23);
  f = sub(_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(power, 23))), all(1.0f));
  e = _mm512_cvtepi32_ps(power);
}

inline __m512 log_of(__m512 f, __m512 e) {
  constexpr float kTerms[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                              1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                              -2.4999993993e-1f, 3.3333331174e-1f};
  const __m512 z = mul(f, f);
  __m512 y = all(7.0376836292e-2f);
  for (const float term : kTerms) y = add(mul(y, f), all(term));
  y = mul(mul(y, f), z);
  y = sub(add(y, mul(e, all(-2.12194440e-4f))), mul(z, all(0.5f)));
  return add(add(f, y), mul(e, all(0.693359375f)));
}

inline __m512 gumbel(__m512i k) {
  const __mmask16 upper = _mm512_movepi32_mask(k);
  const __m512i folded = _mm512_mask_xor_epi32(k, upper, k, _mm512_set1_epi32(-1));
  const __m512 small = mul(add(_mm512_cvtepi32_ps(folded), all(0.5f)), all(0x1p-32f));
  const __mmask16 near = _mm512_mask_cmp_ps_mask(__mmask16(~upper), small, all(0.25f), _CMP_LT_OQ);
  __m512 f, e;
  split(_mm512_mask_blend_ps(upper, sub(all(1.0f), small), small), f, e);
  f = _mm512_mask_blend_ps(near, f, negated(small));
  e = _mm512_mask_blend_ps(near, e, _mm512_setzero_ps());
  split(negated(log_of(f, e)), f, e);
  return negated(log_of(f, e));
}

inline __m512i mixed(__m512i x) {
  x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 30));
  x = _mm512_mullo_epi64(x, _mm512_set1_epi64(int64_t(0xBF58476D1CE4E5B9ull)));
  x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 27));
  x = _mm512_mullo_epi64(x, _mm512_set1_epi64(int64_t(0x94D049BB133111EBull)));
  return _mm512_xor_si512(x, _mm512_srli_epi64(x, 31));
}

// The 32 bits of ids id .. id + 15.
inline __m512i counters(uint64_t key, int64_t id) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
  const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i steps = _mm512_mullo_epi64(lanes, _mm512_set1_epi64(int64_t(kGolden)));
  const uint64_t first = key + (uint64_t(id) + 1) * kGolden;
  const __m512i low = mixed(_mm512_add_epi64(_mm512_set1_epi64(int64_t(first)), steps));
  const __m512i high = mixed(_mm512_add_epi64(_mm512_set1_epi64(int64_t(first + 8 * kGolden)), steps));
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi32(low, odd, high);
}

// exp(relative) * 2^44, of lanes 0 to 7 and 8 to 15.
inline void weigh(__m512 relative, __m512i& low, __m512i& high) {
  constexpr float kTerms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                              1.6666665459e-1f, 5.0000001201e-1f};
  const __m512 x = _mm512_max_ps(relative, all(-40.0f));
  const __m512 n = _mm512_roundscale_ps(mul(x, all(1.44269504f)), kRound);
  const __m512 r = sub(sub(x, mul(n, all(0.693359375f))), mul(n, all(-2.12194440e-4f)));
  __m512 y = all(1.9875691500e-4f);
  for (const float term : kTerms) y = add(mul(y, r), all(term));
  y = add(add(mul(y, mul(r, r)), r), all(1.0f));
  const __m512i power = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
  y = mul(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), power)), all(0x1p44f));
  low = _mm512_cvttps_epi64(_mm512_castps512_ps256(y));
  high = _mm512_cvttps_epi64(_mm512_extractf32x8_ps(y, 1));
}

// Higher scores first, of equal ones lower ids.
inline int64_t rank_of(float score, int64_t id) {
  score += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &score, 4);
  const int64_t ordered = bits ^ (bits >> 31 & 0x7FFFFFFF);
  return int64_t(uint64_t(ordered) << 32) + (0xFFFFFFFFll - id);
}

struct Candidate {
  int64_t rank, weight;
};

// One row's logits and what is known of them.
class Row {
 public:
  Row(const float* logits, int64_t num_ids, const DrawRow& how)
      : logits_(logits), num_ids_(num_ids), how_(how), highest_(size_t((num_ids + kBlock - 1) / kBlock)) {}

  int64_t draw() {
    if (!find_best()) return -1;
    if (how_.temperature == 0.0f) return best_id_;
    std::vector<Candidate> kept;
    const bool best_only = how_.top_k > 0 && how_.top_k < num_ids_;
    if (best_only) keep_best(kept);
    if (how_.top_p < 1.0) {
      if (best_only) {
        int64_t total = 0;
        for (const Candidate& one : kept) total += one.weight;
        keep_nucleus(kept, 0, how_.top_p * double(total));
      } else {
        keep_nucleus_of_all(kept);
      }
    }
    return highest_of_kept();
  }

 private:
  __mmask16 load(int64_t id, __m512& x) const {
    const __mmask16 lanes = first_lanes(num_ids_ - id);
    x = _mm512_mask_loadu_ps(all(kMinusInfinity), lanes, logits_ + id);
    return lanes;
  }

  __m512 relative(__m512 x) const {
    return _mm512_div_ps(sub(x, all(best_)), all(how_.temperature));
  }

  float relative(float x) const { return (x - best_) / how_.temperature; }

  int64_t end_of(size_t block) const { return std::min(int64_t(block + 1) * kBlock, num_ids_); }

  bool find_best() {
    __mmask16 unordered = 0;
    best_ = kMinusInfinity;
    for (size_t block = 0; block < highest_.size(); ++block) {
      __m512 most = all(kMinusInfinity);
      for (int64_t id = int64_t(block) * kBlock; id < end_of(block); id += 16) {
        __m512 x;
        load(id, x);
        unordered |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, x);
      }
      highest_[block] = _mm512_reduce_max_ps(most);
      best_ = std::max(best_, highest_[block]);
    }
    if (unordered || !std::isfinite(best_)) return false;
    const size_t block = size_t(std::find(highest_.begin(), highest_.end(), best_) - highest_.begin());
    best_id_ = int64_t(block) * kBlock;
    while (logits_[best_id_] != best_) ++best_id_;
    return true;
  }

  // How far below the best, in bins that are narrow where ids crowd; monotone in the logit.
  static __m512i bins_of(__m512 ratio) {
    const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(_mm512_abs_ps(ratio)), 17);
    const __m512i bin = _mm512_sub_epi32(bits, _mm512_set1_epi32(kFirstBin));
    return _mm512_min_epi32(_mm512_max_epi32(bin, _mm512_setzero_si512()), _mm512_set1_epi32(kLastBin));
  }

  // Appends the ids whose logit is at least `least`, of one bin or (-1) of all.
  void collect(float least, int32_t bin, std::vector<Candidate>& to) const {
    alignas(64) float values[16];
    alignas(64) int64_t weights[16];
    for (size_t block = 0; block < highest_.size(); ++block) {
      if (highest_[block] < least) continue;
      if (bin >= 0 && _mm512_cvtsi512_si32(bins_of(all(relative(highest_[block])))) > bin) continue;
      for (int64_t id = int64_t(block) * kBlock; id < end_of(block); id += 16) {
        __m512 x;
        const __mmask16 lanes = load(id, x);
        const __m512 ratio = relative(x);
        unsigned chosen = _mm512_mask_cmp_ps_mask(lanes, x, all(least), _CMP_GE_OQ);
        if (bin >= 0) chosen &= _mm512_cmpeq_epi32_mask(bins_of(ratio), _mm512_set1_epi32(bin));
        if (!chosen) continue;
        __m512i low, high;
        weigh(ratio, low, high);
        _mm512_store_ps(values, x);
        _mm512_store_si512(weights, low);
        _mm512_store_si512(weights + 8, high);
        for (; chosen; chosen &= chosen - 1) {
          const int lane = __builtin_ctz(chosen);
          to.push_back({rank_of(values[lane], id + lane), weights[lane]});
        }
      }
    }
  }

  void keep_best(std::vector<Candidate>& kept) {
    const size_t k = size_t(how_.top_k);
    float least = kMinusInfinity;
    if (k <= highest_.size()) {  // the k-th best logit is no lower than the k-th best block's
      std::vector<float> blocks = highest_;
      std::nth_element(blocks.begin(), blocks.begin() + (k - 1), blocks.end(), std::greater<float>());
      least = blocks[k - 1];
    }
    collect(least, -1, kept);
    std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), higher);
    kept.resize(k);
    stay_above(kept[k - 1].rank);
  }

  // Keeps of all ids what has the mass that top_p wants.
  void keep_nucleus_of_all(std::vector<Candidate>& kept) {
    alignas(64) int32_t bins[16];
    alignas(64) int64_t weights[16];
    // Two, because ids that follow one another are often of one bin.
    int64_t masses[2][kLastBin + 1] = {};
    for (size_t block = 0; block < highest_.size(); ++block) {
      if (relative(highest_[block]) < kNoWeight) continue;
      for (int64_t id = int64_t(block) * kBlock; id < end_of(block); id += 16) {
        __m512 x;
        load(id, x);
        const __m512 ratio = relative(x);
        unsigned open = _mm512_cmp_ps_mask(ratio, all(kNoWeight), _CMP_GE_OQ);
        if (!open) continue;
        __m512i low, high;
        weigh(ratio, low, high);
        _mm512_store_si512(bins, bins_of(ratio));
        _mm512_store_si512(weights, low);
        _mm512_store_si512(weights + 8, high);
        for (int lane = 0; lane < 16; ++lane) masses[lane & 1][bins[lane]] += weights[lane];
      }
    }
    int64_t total = 0;
    for (int32_t bin = 0; bin <= kLastBin; ++bin) total += masses[0][bin] += masses[1][bin];
    const double wanted = how_.top_p * double(total);
    int64_t above = 0;
    int32_t bin = 0;
    for (; bin < kLastBin && double(above + masses[0][bin]) < wanted; ++bin) above += masses[0][bin];
    collect(kMinusInfinity, bin, kept);
    keep_nucleus(kept, above, wanted);
  }

  // Narrows `kept`, which has `above` over it, to where the mass passes `wanted`, and keeps that.
  void keep_nucleus(std::vector<Candidate>& kept, int64_t above, double wanted) {
    std::vector<Candidate> higher_ones, between, lower_ones;
    while (kept.size() > kSorted) {
      constexpr size_t kSample = 64, kMargin = 3;
      std::vector<Candidate> sample;
      for (size_t i = 0; i < kSample; ++i) sample.push_back(kept[i * kept.size() / kSample]);
      std::sort(sample.begin(), sample.end(), higher);
      double mass = 0.0, so_far = 0.0;
      for (const Candidate& one : kept) mass += double(one.weight);
      double sampled = 0.0;
      for (const Candidate& one : sample) sampled += double(one.weight);
      size_t at = 0;
      const double part = mass > 0.0 ? (wanted - double(above)) / mass * sampled : 0.0;
      while (at + 1 < kSample && (so_far += double(sample[at].weight)) < part) ++at;
      const int64_t upper = sample[at > kMargin ? at - kMargin : 0].rank;
      const int64_t lower = sample[std::min(at + kMargin, kSample - 1)].rank;
      higher_ones.clear(), between.clear(), lower_ones.clear();
      int64_t higher_mass = 0, between_mass = 0;
      for (const Candidate& one : kept) {
        if (one.rank > upper) {
          higher_ones.push_back(one), higher_mass += one.weight;
        } else if (one.rank >= lower) {
          between.push_back(one), between_mass += one.weight;
        } else {
          lower_ones.push_back(one);
        }
      }
      if (double(above + higher_mass) >= wanted) {
        kept.swap(higher_ones);
      } else if (double(above + higher_mass + between_mass) >= wanted || lower_ones.empty()) {
        above += higher_mass;
        if (between.size() == kept.size()) break;
        kept.swap(between);
      } else {
        above += higher_mass + between_mass;
        stay_above(lower);
        kept.swap(lower_ones);
      }
    }
    std::sort(kept.begin(), kept.end(), higher);
    for (const Candidate& one : kept) {
      if (double(above) >= wanted) break;
      stay_above(one.rank);
      above += one.weight;
    }
  }

  static bool higher(const Candidate& a, const Candidate& b) { return a.rank > b.rank; }

  // From now on only ids of this rank and above are kept.
  void stay_above(int64_t rank) {
    last_id_ = 0xFFFFFFFFll - (rank & 0xFFFFFFFFll);
    least_ = logits_[last_id_];
  }

  int64_t highest_of_kept() const {
    alignas(64) float scores[16];
    _mm512_store_ps(scores, gumbel(counters(how_.key, best_id_)));
    float most = scores[0];
    int64_t winner = best_id_;
    const __m512 floor = all(how_.log_min_p), least = all(least_);
    for (size_t block = 0; block < highest_.size(); ++block) {
      const float ratio_of_best = relative(highest_[block]);
      if (highest_[block] < least_ || ratio_of_best < how_.log_min_p) continue;
      if (ratio_of_best + kNoiseMax < most) continue;
      for (int64_t id = int64_t(block) * kBlock; id < end_of(block); id += 16) {
        __m512 x;
        __mmask16 open = load(id, x);
        const __m512 ratio = relative(x);
        open &= _mm512_cmp_ps_mask(ratio, floor, _CMP_GE_OQ);
        open = _mm512_mask_cmp_ps_mask(open, add(ratio, all(kNoiseMax)), all(most), _CMP_GE_OQ);
        const __mmask16 at_edge = _mm512_cmp_ps_mask(x, least, _CMP_EQ_OQ);
        open &= _mm512_cmp_ps_mask(x, least, _CMP_GT_OQ) | (at_edge & first_lanes(last_id_ - id + 1));
        if (!open) continue;
        const __m512i k = counters(how_.key, id);
        // w is at least 2^(zeros - 32), and the noise no more than -log(w).
        const __m512 zeros = sub(all(32.0f), _mm512_getexp_ps(_mm512_cvtepu32_ps(k)));
        const __m512 bound = add(ratio, add(mul(zeros, all(0.69315f)), all(1e-3f)));
        unsigned chosen = _mm512_mask_cmp_ps_mask(open, bound, all(most), _CMP_GE_OQ);
        if (!chosen) continue;
        _mm512_store_ps(scores, add(ratio, gumbel(k)));
        for (; chosen; chosen &= chosen - 1) {
          const int lane = __builtin_ctz(chosen);
          if (scores[lane] > most || (scores[lane] == most && id + lane < winner)) {
            most = scores[lane];
            winner = id + lane;
          }
        }
      }
    }
    return winner;
  }

  const float* logits_;
  const int64_t num_ids_;
  const DrawRow how_;
  std::vector<float> highest_;  // of each block
  float best_ = 0.0f;
  int64_t best_id_ = 0;
  float least_ = kMinusInfinity;  // kept are higher logits, and of equal ones ids up to `last_id_`
  int64_t last_id_ = std::numeric_limits<int64_t>::max() / 2;
};

}  // namespace
}  // namespace sf

extern "C" {

using namespace sf;

// A token for each row of logits [count, num_ids], `stride` floats apart; -1: they are no numbers.
// Returns 1: no memory.
int32_t sf_draw(void* pool, const float* logits, int64_t stride, int64_t num_ids, const DrawRow* rows,
                int64_t count, int64_t* tokens) {
  std::atomic<int32_t> failed{0};
  static_cast<Pool*>(pool)->run(
      [&](Team& team, int) {
        team.share(count, [&](int64_t row) {
          try {
            tokens[row] = Row(logits + row * stride, num_ids, rows[row]).draw();
          } catch (...) {
            failed = 1;
          }
        });
      },
      count == 1);
  return failed;
}

// fp32 noise of each of `count` (a multiple of 16) 32-bit counters, for tests.
void sf_gumbel(const uint32_t* counters, int64_t count, float* noise) {
  for (int64_t i = 0; i < count; i += 16)
    _mm512_storeu_ps(noise + i, gumbel(_mm512_loadu_si512(counters + i)));
}

}  // extern "C"
