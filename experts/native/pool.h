// A small thread pool for kernels that last 5 us to 100 ms, and scratch memory for one call.
//
// The calling thread takes part as thread 0. Helpers wait for work by spinning for a bounded time
// (decode calls follow each other within microseconds) and then sleep on a futex, because several
// processes share the cores. A job is a counter of tasks that threads draw from; the caller waits
// only for helpers that joined, never for one that has yet to wake up: a neighbour that holds a core
// slows a job down and cannot stall it. Which thread runs a task never changes its result.
//
// Every entry point holds a `Region`, which makes calls from several threads take turns.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace em {

class Pool {
 public:
  static Pool& get();
  void set_threads(int n);
  int threads() const { return active_; }
  void set_spin_us(int us) { spin_ns_ = int64_t(us) * 1000; }
  void park() { parked_.store(true, std::memory_order_relaxed); }

  // Run f(task) for every task in [0, tasks).
  template <class F>
  void run(int64_t tasks, const F& f) {
    if (tasks <= 1 || active_ == 1) {
      for (int64_t i = 0; i < tasks; i++) f(i);
      return;
    }
    run_job(tasks, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
            (void*)&f);
  }

  std::mutex mutex;

 private:
  using Task = void (*)(void*, int64_t);
  void run_job(int64_t tasks, Task task, void* context);
  void draw();
  void help(int index);

  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<uint32_t> joined_{0};  // kOpen | number of helpers inside
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> parked_{false};
  std::atomic<int> active_{1};
  std::atomic<int64_t> spin_ns_{30000};
  int started_ = 1;
  int64_t tasks_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
};

// Exclusive use of the pool and of its scratch memory for the length of one call.
class Region {
 public:
  Region();
  ~Region();
  template <class F>
  void run(int64_t tasks, const F& f) {
    pool_.run(tasks, f);
  }
  int threads() const { return pool_.threads(); }
  // Uninitialised, 64-byte aligned, valid until the region ends.
  template <class T>
  T* scratch(int64_t count) {
    return static_cast<T*>(bytes(size_t(count) * sizeof(T)));
  }

 private:
  void* bytes(size_t size);
  Pool& pool_;
  std::lock_guard<std::mutex> lock_;
};

// Uninitialised, 64-byte aligned memory of this thread, valid until its next call.
void* thread_scratch(size_t size);

}  // namespace em
