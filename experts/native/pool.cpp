#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <thread>

namespace em {
namespace {

constexpr uint32_t kOpen = 1u << 31;
// After its spin a helper dozes: awake, but yielding the core at every look. A decode step's pauses (a round trip to the expert
// groups) are shorter, and waking a sleeper on an idle virtual core costs more than a layer: bench-small decodes 1.1 to 1.5 times
// as fast with it (LOG.md).
constexpr int64_t kDozeNs = 1000000;
constexpr size_t kKeepScratch = size_t(96) << 20;  // larger scratch is given back after the call

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

void futex(std::atomic<uint32_t>& word, int op, uint32_t value) {
  syscall(SYS_futex, &word, op | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

struct Chunk {
  char* data;
  size_t size;
};
struct Scratch {
  std::vector<Chunk> chunks;
  size_t used = 0;  // of the last chunk
  size_t total = 0;
};
Scratch& scratch_memory() {
  static auto* memory = new Scratch;
  return *memory;
}

}  // namespace

Pool& Pool::get() {
  static auto* pool = new Pool;  // never destroyed: helpers may outlive static destructors
  return *pool;
}

void Pool::set_threads(int n) {
  std::lock_guard<std::mutex> lock(mutex);
  n = std::max(1, n);
  for (; started_ < n; started_++) {
    std::thread([this, index = started_] { help(index); }).detach();
  }
  active_ = n;
}

void Pool::draw() {
  for (;;) {
    int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
    if (i >= tasks_) return;
    task_(context_, i);
  }
}

void Pool::run_job(int64_t tasks, Task task, void* context) {
  tasks_ = tasks;
  task_ = task;
  context_ = context;
  parked_.store(false, std::memory_order_relaxed);
  next_.store(0, std::memory_order_relaxed);
  joined_.store(kOpen, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) futex(epoch_, FUTEX_WAKE, INT_MAX);
  draw();
  joined_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; joined_.load(std::memory_order_acquire) != 0; spins++) {
    spins < 4000 ? _mm_pause() : (void)sched_yield();  // the helper may need this very core
  }
}

void Pool::help(int index) {
  uint32_t seen = 0;
  for (;;) {
    int64_t end = 0;
    for (int spins = 1; epoch_.load(std::memory_order_acquire) == seen; spins++) {
      _mm_pause();
      if (spins % 16) continue;
      const int64_t now = now_ns();
      if (end == 0) end = now + spin_ns_;
      if (index < active_ && !parked_.load(std::memory_order_relaxed)) {
        if (now < end) continue;
        if (now < end + kDozeNs) {
          sched_yield();
          continue;
        }
      }
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      if (epoch_.load(std::memory_order_seq_cst) == seen) futex(epoch_, FUTEX_WAIT, seen);
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
    seen = epoch_.load(std::memory_order_acquire);
    if (index >= active_) continue;
    uint32_t state = joined_.load(std::memory_order_acquire);
    while ((state & kOpen) && !joined_.compare_exchange_weak(state, state + 1)) {
    }
    if (!(state & kOpen)) continue;
    draw();
    joined_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

Region::Region() : pool_(Pool::get()), lock_(pool_.mutex) {}

Region::~Region() {
  Scratch& memory = scratch_memory();
  if (memory.chunks.size() > 1 || memory.total > kKeepScratch) {  // next time one chunk will do
    for (Chunk& chunk : memory.chunks) std::free(chunk.data);
    size_t size = memory.total;
    memory = Scratch();
    if (size <= kKeepScratch) bytes(size);
  }
  memory.used = 0;
}

void* Region::bytes(size_t size) {
  Scratch& memory = scratch_memory();
  size = (size + 127) / 64 * 64;
  if (memory.chunks.empty() || memory.used + size > memory.chunks.back().size) {
    size_t chunk = std::max(size, size_t(1) << 20);
    chunk = (chunk + 4095) / 4096 * 4096;
    char* data = static_cast<char*>(std::aligned_alloc(4096, chunk));
    if (data == nullptr) std::abort();  // callers bound what they ask for; there is no half a result
    memory.chunks.push_back({data, chunk});
    memory.total += chunk;
    memory.used = 0;
  }
  char* data = memory.chunks.back().data + memory.used;
  memory.used += size;
  return data;
}

namespace {

constexpr size_t kHuge = size_t(2) << 20;
constexpr size_t kArena = size_t(64) << 20;

// Zeroed memory that starts at a huge page, in huge pages where the system has them on request:
// weights are read from end to end, and a fifth faster so (measured, one row, one thread).
char* map_pages(size_t size) {
  char* base = static_cast<char*>(mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base == MAP_FAILED) return nullptr;
  char* start = base + (kHuge - uintptr_t(base) % kHuge) % kHuge;
  if (start > base) munmap(base, size_t(start - base));
  munmap(start + size, size_t(base + kHuge - start));
  madvise(start, size, MADV_HUGEPAGE);
  return start;
}

// Small weights share arenas, so that they share huge pages. An arena goes when its last one goes.
struct Arena {
  char* start;
  size_t used;
  int64_t live;
};
std::mutex arenas_mutex;
std::vector<Arena>& arenas() {
  static auto* all = new std::vector<Arena>;
  return *all;
}

size_t whole_pages(size_t size) { return std::max<size_t>(4096, (size + 4095) / 4096 * 4096); }

void* allocate(size_t size) {
  size = whole_pages(size);
  if (size > kArena / 4) return map_pages(size);
  std::lock_guard<std::mutex> lock(arenas_mutex);
  if (arenas().empty() || arenas().back().used + size > kArena) {
    char* start = map_pages(kArena);
    if (start == nullptr) return nullptr;
    arenas().push_back({start, 0, 0});
  }
  Arena& arena = arenas().back();
  arena.live++;
  arena.used += size;
  return arena.start + arena.used - size;
}

void release(void* data, size_t size) {
  size = whole_pages(size);
  if (size > kArena / 4) {
    munmap(data, size);
    return;
  }
  std::lock_guard<std::mutex> lock(arenas_mutex);
  for (size_t i = 0; i < arenas().size(); i++) {
    Arena& arena = arenas()[i];
    if (data < arena.start || data >= arena.start + kArena) continue;
    if (--arena.live > 0) return;
    munmap(arena.start, kArena);
    arenas().erase(arenas().begin() + int64_t(i));
    return;
  }
}

}  // namespace

void* thread_scratch(size_t size) {
  thread_local Chunk chunk{nullptr, 0};
  if (size > chunk.size) {
    std::free(chunk.data);
    size = (size + 65535) / 65536 * 65536;
    chunk = {static_cast<char*>(std::aligned_alloc(4096, size)), size};
  }
  return chunk.data;
}

}  // namespace em

extern "C" {

void em_set_threads(int n) { em::Pool::get().set_threads(n); }
int em_threads() { return em::Pool::get().threads(); }
void em_set_spin_us(int us) { em::Pool::get().set_spin_us(us); }
void em_park() { em::Pool::get().park(); }

void* em_alloc(int64_t size) { return em::allocate(size_t(size)); }
void em_free(void* data, int64_t size) { em::release(data, size_t(size)); }

// Gives the whole pages inside back to the system; they read as zeros from then on.
void em_discard(void* data, int64_t size) {
  const uintptr_t start = (uintptr_t(data) + 4095) / 4096 * 4096;
  const uintptr_t end = (uintptr_t(data) + uintptr_t(size)) / 4096 * 4096;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED);
}
}
