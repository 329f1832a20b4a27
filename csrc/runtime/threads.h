// Threads that work through the phases of a step together.
//
// They are OpenMP's, so that a process that runs PyTorch as well has one pool and not two that spin against each other.
// A thread that waits for a phase to end spins for some microseconds only and then gives the processor away: where another program
// runs on one of the cores, a thread that spins keeps the one it waits for from being scheduled.
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

// While it lives, this thread takes denormal numbers for zero: arithmetic with them is many times slower on some processors.
class WithoutDenormals {
 public:
#if defined(__x86_64__)
  WithoutDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // results, and operands
  ~WithoutDenormals() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  WithoutDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (1 << 24)));
  }
  ~WithoutDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }
#else
  WithoutDenormals() {}
#endif
  WithoutDenormals(const WithoutDenormals&) = delete;
  WithoutDenormals& operator=(const WithoutDenormals&) = delete;

 private:
#if defined(__x86_64__)
  unsigned before_;
#elif defined(__aarch64__)
  uint64_t before_;
#endif
};

// A phase of a step: pieces of work that threads take in turn. It is over when all pieces are done, whoever did them: a
// thread that another program keeps from running is not waited for unless it holds a piece.
class Phase {
 public:
  void reset() {
    next_.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
  }

  // Calls piece(first, last) for pieces of [0, count), `grain` at a time, and returns when all of them are done.
  template <class Piece>
  void run(int64_t count, int64_t grain, const Piece& piece) {
    for (;;) {
      const int64_t first = next_.fetch_add(grain, std::memory_order_relaxed);
      if (first >= count) break;
      const int64_t last = first + grain < count ? first + grain : count;
      piece(first, last);
      done_.fetch_add(last - first, std::memory_order_acq_rel);
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < 1000) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

// OpenMP's threads do not survive a fork: the child would wait for them for ever. It works alone instead.
inline std::atomic<bool> forked{false};
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Calls work(thread) on up to `threads` threads.
template <class Work>
void run_parallel(int threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1 && !forked.load()) {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
    return;
  }
#endif
  work(0);
}

}  // namespace gossamer
