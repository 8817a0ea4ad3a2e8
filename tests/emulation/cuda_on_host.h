// Compiles a .cu file as plain C++ and runs its kernels on the host:
//
//     g++ -x c++ -DVG_EMULATED -include cuda_on_host.h file.cu      (with the CUDA headers)
//
// Every CUDA thread is a fiber. Barriers and warp collectives are the points where fibers change,
// in an order that VG_SCHED sets (fwd, rev or a seed): a result that depends on it has a race.
// Shared memory is NaN-filled before each block. A barrier that some threads never reach, a
// collective that names a thread which has left, or an illegal launch aborts with a message.
// Addresses are guarded when built with -fsanitize=address. Blocks run one after another.
//
// Not seen here: memory order between blocks, approximate instructions, registers, bank conflicts.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// csrc/device.cuh has the same three for nvcc.
#define VG_SHARED(T, name)   \
  static char vg_key_##name; \
  T& name = *reinterpret_cast<T*>(vg_emulation::shared(&vg_key_##name, sizeof(T), alignof(T)))
#define VG_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(vg_emulation::block()->dynamic)
#define VG_LAUNCH(kernel, grid, threads, bytes, stream, ...) \
  vg_emulation::launch(dim3(grid), dim3(threads), bytes, [=] { kernel(__VA_ARGS__); })

namespace vg_emulation {

constexpr size_t kStack = 256 << 10;

struct Fiber {
  enum State { kReady, kAtBarrier, kAtCollective, kDone };
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  uint3 thread{};
  int number = 0;
  State state = kDone;
  uint32_t mask = 0;  // of the collective that it waits for
  void* fake_stack = nullptr;
};

// The lanes of one mask, meeting at a collective. Two buffers: a fast lane may already bring its
// value of the next collective while a slow one has yet to read this one.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  unsigned round = 0;
  alignas(16) unsigned char values[2][32][64];
};

struct Warp {
  std::vector<Meeting> meetings;
  uint32_t live = 0;
  Meeting& of(uint32_t mask) {
    for (auto& m : meetings)
      if (m.mask == mask) return m;
    meetings.emplace_back();
    meetings.back().mask = mask;
    return meetings.back();
  }
};

struct Block {
  dim3 grid, threads;
  uint3 index{};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;
  int count = 0, live = 0, waiting = 0, votes = 0, votes_before = 0;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  void *main_pointer = nullptr, *main_fake = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
  char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  struct Static {
    const void* key;
    size_t bytes;
    char* memory;  // an allocation each, so that AddressSanitizer guards its ends
  };
  std::vector<Static> statics;
};

inline Block*& block() {
  static thread_local Block* b = nullptr;
  return b;
}

inline void* shared(const void* key, size_t bytes, size_t align) {
  Block* b = block();
  for (auto& s : b->statics)
    if (s.key == key) return s.memory;
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max(align, sizeof(void*)), bytes)) std::abort();
  memset(memory, 0xff, bytes);
  b->statics.push_back({key, bytes, static_cast<char*>(memory)});
  return memory;
}

// Saves the callee's registers and stack pointer, and continues where `to` was left.
extern "C" void vg_switch(void** save, void* to);
asm(R"(
.text
.weak vg_switch
.type vg_switch,@function
vg_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size vg_switch,.-vg_switch
)");

inline void to_main(bool leaving = false) {
  Block* b = block();
  Fiber* f = b->running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaving ? nullptr : &f->fake_stack, b->main_bottom, b->main_size);
#endif
  vg_switch(&f->stack_pointer, b->main_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->fake_stack, nullptr, nullptr);
#endif
  (void)leaving;
}

inline void to_fiber(Fiber* f) {
  Block* b = block();
  b->running = f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&b->main_fake, f->stack, kStack);
#endif
  vg_switch(&b->main_pointer, f->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(b->main_fake, nullptr, nullptr);
#endif
}

[[noreturn]] inline void die(const char* why) {
  Block* b = block();
  fprintf(stderr, "emulated CUDA: %s in block (%u,%u,%u)\n", why, b->index.x, b->index.y,
          b->index.z);
  int shown = 0;
  for (auto& f : b->fibers)
    if (f.state != Fiber::kDone && shown++ < 8)
      fprintf(stderr, "  thread %d: %s\n", f.number,
              f.state == Fiber::kAtBarrier      ? "at __syncthreads"
              : f.state == Fiber::kAtCollective ? "at a warp collective"
                                                : "running");
  std::abort();
}

inline void release_barrier() {
  Block* b = block();
  if (!b->waiting || b->waiting < b->live) return;
  b->votes_before = b->votes;
  b->votes = b->waiting = 0;
  for (auto& f : b->fibers)
    if (f.state == Fiber::kAtBarrier) f.state = Fiber::kReady;
}

inline void entry() {
  Block* b = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b->main_bottom, &b->main_size);
#endif
  (*b->body)();
  Fiber* f = b->running;
  f->state = Fiber::kDone;
  --b->live;
  b->warps[f->number / 32].live &= ~(1u << (f->number & 31));
  release_barrier();
  to_main(true);
  std::abort();
}

inline int barrier(int vote) {
  Block* b = block();
  b->votes += vote != 0;
  ++b->waiting;
  b->running->state = Fiber::kAtBarrier;
  release_barrier();
  to_main();  // always, so that the schedule decides who goes first after the barrier
  return block()->votes_before;
}

// Every lane of `mask` brings `bytes`; returns what the 32 lanes brought, once all are there.
inline const unsigned char (*meet(uint32_t mask, const void* value, size_t bytes))[64] {
  Block* b = block();
  Fiber* f = b->running;
  Warp& w = b->warps[f->number / 32];
  const int first = f->number / 32 * 32, lanes = b->count - first;
  const uint32_t own = 1u << (f->number & 31);
  mask &= lanes >= 32 ? ~0u : (1u << lanes) - 1;
  if (!(mask & own)) die("a lane is not in the mask of its own collective");
  if (mask & ~w.live) die("a warp collective names a thread that has left");
  Meeting* m = &w.of(mask);
  const unsigned round = m->round;
  memcpy(m->values[round & 1][f->number & 31], value, bytes);
  m->arrived |= own;
  if (m->arrived == mask) {
    m->arrived = 0;
    ++m->round;
    for (int i = first; i < first + 32 && i < b->count; ++i) {
      Fiber& other = b->fibers[i];
      if (other.state == Fiber::kAtCollective && other.mask == mask) other.state = Fiber::kReady;
    }
  } else {
    f->state = Fiber::kAtCollective;
    f->mask = mask;
    to_main();
  }
  return b->warps[f->number / 32].of(mask).values[round & 1];
}

inline void run_block(Block* b, const char* schedule, std::mt19937& random) {
  b->live = b->count;
  b->waiting = b->votes = 0;
  for (auto& w : b->warps) w.meetings.clear(), w.live = 0;
  for (auto& s : b->statics) memset(s.memory, 0xff, s.bytes);
  if (b->dynamic_bytes) memset(b->dynamic, 0xff, b->dynamic_bytes);
  for (int i = 0; i < b->count; ++i) {
    Fiber& f = b->fibers[i];
    f.number = i;
    f.thread = make_uint3(i % b->threads.x, i / b->threads.x % b->threads.y,
                          i / (b->threads.x * b->threads.y));
    f.state = Fiber::kReady;
    f.fake_stack = nullptr;
    b->warps[i / 32].live |= 1u << (i & 31);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.stack, kStack);
#endif
    void** top = reinterpret_cast<void**>(f.stack + kStack - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int k = 0; k < 6; ++k) *--top = nullptr;  // the registers that vg_switch takes
    f.stack_pointer = top;
  }
  while (b->live) {
    if (!strcmp(schedule, "rev"))
      std::sort(b->order.rbegin(), b->order.rend());
    else if (strcmp(schedule, "fwd"))
      std::shuffle(b->order.begin(), b->order.end(), random);
    bool moved = false;
    for (int i : b->order)
      if (b->fibers[i].state == Fiber::kReady) moved = true, to_fiber(&b->fibers[i]);
    if (!moved) die("deadlock: a barrier or collective that not all threads reach");
  }
}

inline void launch(dim3 grid, dim3 threads, size_t bytes, const std::function<void()>& body) {
  const char* schedule = getenv("VG_SCHED");
  if (!schedule) schedule = "fwd";
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  if (threads.x * threads.y * threads.z > 1024 || bytes > (227u << 10) || grid.y > 65535 ||
      grid.z > 65535 || grid.x > 0x7fffffffu || blocks == 0) {
    fprintf(stderr, "emulated CUDA: illegal launch configuration\n");
    std::abort();
  }
  std::mt19937 random(atoi(schedule));
  std::vector<int64_t> order(blocks);
  for (int64_t i = 0; i < blocks; ++i) order[i] = i;
  if (!strcmp(schedule, "rev"))
    std::reverse(order.begin(), order.end());
  else if (strcmp(schedule, "fwd"))
    std::shuffle(order.begin(), order.end(), random);
  Block b;
  b.grid = grid;
  b.threads = threads;
  b.count = threads.x * threads.y * threads.z;
  b.body = &body;
  b.fibers.resize(b.count);
  b.warps.resize((b.count + 31) / 32);
  for (int i = 0; i < b.count; ++i) b.order.push_back(i);
  const size_t stacks = kStack * b.count;
  void* memory = mmap(nullptr, stacks, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  for (int i = 0; i < b.count; ++i) b.fibers[i].stack = static_cast<char*>(memory) + kStack * i;
  if ((b.dynamic_bytes = bytes)) {
    void* p = nullptr;
    if (posix_memalign(&p, 128, bytes)) std::abort();
    b.dynamic = static_cast<char*>(p);
  }
  Block* outer = block();
  block() = &b;
  for (int64_t i : order) {
    b.index = make_uint3(i % grid.x, i / grid.x % grid.y, i / (int64_t(grid.x) * grid.y));
    run_block(&b, schedule, random);
  }
  block() = outer;
  munmap(memory, stacks);
  free(b.dynamic);
  for (auto& s : b.statics) free(s.memory);
}

template <class T, class Source>
inline T shuffle(uint32_t mask, T value, Source source, int width) {
  const int lane = block()->running->number & 31;
  const auto values = meet(mask, &value, sizeof value);
  const int from = source(lane, lane / width * width);
  if (from < 0) return value;
  if (!(mask >> from & 1)) die("a shuffle reads a lane outside its mask");
  memcpy(&value, values[from], sizeof value);
  return value;
}

}  // namespace vg_emulation

#define threadIdx (vg_emulation::block()->running->thread)
#define blockIdx (vg_emulation::block()->index)
#define blockDim (vg_emulation::block()->threads)
#define gridDim (vg_emulation::block()->grid)
#define cudaGetLastError() cudaSuccess

inline void __syncthreads() { vg_emulation::barrier(0); }
inline int __syncthreads_or(int vote) { return vg_emulation::barrier(vote) != 0; }
inline int __syncthreads_count(int vote) { return vg_emulation::barrier(vote); }
inline void __syncwarp(unsigned mask = ~0u) {
  char nothing = 0;
  vg_emulation::meet(mask, &nothing, 1);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32) {
  return vg_emulation::shuffle(
      mask, v, [=](int l, int base) { return (l ^ with) < base + width ? l ^ with : -1; }, width);
}
template <class T>
inline T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  return vg_emulation::shuffle(
      mask, v, [=](int, int base) { return base + (from & (width - 1)); }, width);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
  return vg_emulation::shuffle(
      mask, v, [=](int l, int base) { return l + int(by) < base + width ? l + int(by) : -1; },
      width);
}
inline float cospif(float x) { return float(std::cos(3.14159265358979323846 * double(x))); }
inline float sinpif(float x) { return float(std::sin(3.14159265358979323846 * double(x))); }
