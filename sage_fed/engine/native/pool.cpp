#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace sf {
namespace {

constexpr int kSpins = 2000;         // of a pause each: some tens of microseconds
constexpr int kBarrierSpins = 20000;  // then give the core away: somebody else may need it

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

Pool::Pool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads), counters_(3 * num_threads_) {
  for (int thread = 1; thread < num_threads_; ++thread) threads_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  stop_ = true;
  generation_.fetch_add(1);
  futex_wake_all(generation_);
  for (auto& thread : threads_) thread.join();
}

void Pool::run(void (*work)(void*, Team&, int), void* argument, bool alone) {
  std::lock_guard<std::mutex> lock(one_at_a_time_);
  for (auto& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
  const bool together = num_threads_ > 1 && !alone;
  if (together) {
    work_ = work;
    argument_ = argument;
    running_.store(num_threads_ - 1, std::memory_order_relaxed);
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) futex_wake_all(generation_);
  }
  Team team(*this, 0, together ? num_threads_ : 1);
  work(argument, team, 0);
  if (!together) return;
  for (int spins = 0; running_.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kBarrierSpins) _mm_pause();
    else sched_yield();
  }
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; generation_.load(std::memory_order_acquire) == seen; ++spins) {
      if (spins < kSpins) {
        _mm_pause();
        continue;
      }
      sleepers_.fetch_add(1);
      if (generation_.load() == seen) futex_wait(generation_, seen);
      sleepers_.fetch_sub(1);
    }
    ++seen;
    if (stop_) return;
    Team team(*this, thread, num_threads_);
    work_(argument_, team, thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

void Team::barrier() {
  const int threads = num_threads_;
  if (threads == 1) return;
  const uint32_t round = pool_.barrier_.load(std::memory_order_relaxed);
  if (pool_.arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
    pool_.arrived_.store(0, std::memory_order_relaxed);
    pool_.barrier_.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; pool_.barrier_.load(std::memory_order_acquire) == round; ++spins) {
    if (spins < kBarrierSpins) _mm_pause();
    else sched_yield();
  }
}

}  // namespace sf
