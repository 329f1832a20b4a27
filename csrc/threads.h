// Threads that work through the phases of a step together.
//
// They are OpenMP's, so that a process that runs PyTorch as well has one pool and not two that spin against each other.
// Within a step the threads meet at barriers that spin for some microseconds only and then give the processor away:
// where another program runs on one of the cores, a thread that spins keeps the one it waits for from being scheduled.
#pragma once

#include <atomic>
#include <cstdint>

#include <pthread.h>
#include <sched.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads), waiting_(0), phase_(0) {}

  void wait() {
    if (threads_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 1000) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> waiting_;
  alignas(64) std::atomic<uint32_t> phase_;
};

// OpenMP's threads do not survive a fork: the child would wait for them for ever. It works alone instead.
inline std::atomic<bool> forked{false};
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Calls work(thread, barrier, count) on up to `threads` threads.
template <class Work>
void run_parallel(int threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1 && !forked.load()) {
    // OpenMP may give fewer threads than it is asked for, so the barrier counts those that came.
    alignas(Barrier) unsigned char place[sizeof(Barrier)];
    Barrier* barrier = nullptr;
#pragma omp parallel num_threads(threads) shared(barrier)
    {
#pragma omp single
      barrier = new (place) Barrier(omp_get_num_threads());
      work(omp_get_thread_num(), *barrier, omp_get_num_threads());
    }
    return;
  }
#endif
  Barrier alone(1);
  work(0, alone, 1);
}

}  // namespace gossamer
