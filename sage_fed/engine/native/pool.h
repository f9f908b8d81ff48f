// A small pool of threads for one step at a time: fork once, then phases between barriers.
//
// The caller works as thread 0. Workers spin briefly for the next region and then sleep on a
// futex, so an idle engine costs nothing. Within a region `Team` shares out tasks: a thread
// takes its own contiguous range first and then helps the others, so that a core that is busy
// with something else does not hold up the step.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace sf {

class Team;

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return num_threads_; }
  // Runs `work(argument, team, thread)` on every thread and returns when all have finished; with
  // `alone` on the caller's only, for work that is over before the others would be awake.
  void run(void (*work)(void*, Team&, int), void* argument, bool alone);

  template <class F>
  void run(F&& f, bool alone = false) {
    run([](void* argument, Team& team, int thread) { (*static_cast<F*>(argument))(team, thread); },
        const_cast<void*>(static_cast<const void*>(&f)), alone);
  }

 private:
  friend class Team;
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };
  void work(int thread);

  const int num_threads_;
  std::mutex one_at_a_time_;
  void (*work_)(void*, Team&, int) = nullptr;
  void* argument_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> barrier_{0};
  std::vector<Counter> counters_;  // three sets of one counter a thread
  std::vector<std::thread> threads_;
};

// A thread's view of the region it works in; every thread must call the same sequence.
class Team {
 public:
  Team(Pool& pool, int thread, int num_threads)
      : pool_(pool), thread_(thread), num_threads_(num_threads) {}

  // Threads that work on this region.
  int size() const { return num_threads_; }
  void barrier();

  // Calls f(task) for every task in [0, count), each on one thread. Ends without a barrier, but
  // there must be one before the next share(): the counters are used in turn.
  template <class F>
  void share(int64_t count, F&& f) {
    const int threads = num_threads_;
    Pool::Counter* mine = &pool_.counters_[phase_ % 3 * threads];
    pool_.counters_[(phase_ + 1) % 3 * threads + thread_].next.store(0, std::memory_order_relaxed);
    ++phase_;
    for (int i = 0; i < threads; ++i) {
      const int owner = (thread_ + i) % threads;
      const int64_t begin = count * owner / threads, end = count * (owner + 1) / threads;
      for (;;) {
        const int64_t task = begin + mine[owner].next.fetch_add(1, std::memory_order_relaxed);
        if (task >= end) break;
        f(task);
      }
    }
  }

 private:
  Pool& pool_;
  const int thread_;
  const int num_threads_;
  int phase_ = 0;
};

}  // namespace sf
