// emulated.h: enough of CUDA to run one of our kernels on a CPU, for its arithmetic, its indices and its waiting: each
// thread is a coroutine, the CTAs of a cluster (mostly one) run together, clusters one after the other.  A warp's
// instructions that look at other lanes meet at a barrier; bulk copies land at once; nothing here knows of memory order,
// caches or time.
// Included in place of common.cuh; what lies beside it stands for files of kernels/.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <type_traits>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 900

struct uint2 {
  u32 x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct Index {
  u32 x, y;
};
inline Index threadIdx, blockIdx, gridDim;

[[noreturn]] inline void broken(const char* what) {
  std::fprintf(stderr, "%s in CTA %u, thread %u\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}
inline void __trap() { broken("trap"); }

// ------------------------------------------------------------------------------------------------- threads of a CTA
struct Meeting {  // a barrier of `arrived` threads so far
  int arrived = 0;
  u64 turn = 0;
};
struct Thread {
  ucontext_t context;
  bool done = false;
  void* stack = nullptr;
};
constexpr int MOST_THREADS = 1024, STACK_BYTES = 128 << 10, MOST_IDLE_ROUNDS = 20000;
inline Thread threads[MOST_THREADS];
inline ucontext_t scheduler;
inline Meeting warps[MOST_THREADS / 32], whole_ctas[MOST_THREADS / 32];
inline std::map<int, Meeting> named;
inline u64 lanes[MOST_THREADS / 32][32][8];  // what the lanes of a warp show each other
inline u32 running, first_cta;  // of all threads of the cluster this one; the cluster's first CTA
inline int num_threads;         // of a CTA
inline u64 events;  // whatever shows that somebody got on
inline std::function<void()> body;

inline u32 cta_in_cluster() { return running / num_threads; }
inline void become(u32 thread) {
  running = thread, threadIdx.x = thread % num_threads, blockIdx.x = first_cta + thread / num_threads;
}
inline void yield() {
  const u32 me = running;
  swapcontext(&threads[me].context, &scheduler);
  become(me);
}
inline void meet(Meeting& m, int count) {
  const u64 turn = m.turn;
  if (++m.arrived == count) {
    m.arrived = 0, ++m.turn, ++events;
  } else {
    while (m.turn == turn) yield();
  }
}
inline int lane() { return threadIdx.x & 31; }
inline auto& shown() { return lanes[running >> 5]; }
inline void warp_meets() { meet(warps[running >> 5], 32); }
inline void __syncwarp() { warp_meets(); }
inline void __syncthreads() { meet(whole_ctas[cta_in_cluster()], num_threads); }
inline void named_barrier(int id, int count) { meet(named[id], count); }

inline void enter() {
  body();
  threads[running].done = true;
  swapcontext(&threads[running].context, &scheduler);
}

// Every CTA of a grid, in clusters, in this order or the other.
inline void launch(int num_ctas, int threads_each, bool backwards, void (*reset)(), std::function<void()> kernel,
                   int cluster = 1) {
  const int at_once = cluster * threads_each;
  if (at_once > MOST_THREADS) broken("too many threads");
  gridDim.x = num_ctas, num_threads = threads_each, body = std::move(kernel);
  for (int i = 0; i < num_ctas / cluster; ++i) {
    first_cta = (backwards ? num_ctas / cluster - 1 - i : i) * cluster;
    named.clear();
    reset();
    for (int t = 0; t < at_once; ++t) {
      Thread& thread = threads[t];
      thread.done = false;
      if (!thread.stack) thread.stack = std::malloc(STACK_BYTES);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack, thread.context.uc_stack.ss_size = STACK_BYTES;
      makecontext(&thread.context, enter, 0);
    }
    for (int left = at_once, idle = 0; left;) {
      const int before = left;
      const u64 seen = events;
      for (int t = 0; t < at_once; ++t) {
        if (threads[t].done) continue;
        become(t);
        swapcontext(&scheduler, &threads[t].context);
        left -= threads[t].done;
      }
      idle = left == before && events == seen ? idle + 1 : 0;
      if (idle > MOST_IDLE_ROUNDS) broken("everybody waits");
    }
  }
}

// ------------------------------------------------------------------------------------------- shared memory, barriers
extern u8 ring_memory[];
constexpr u32 SHARED_BASE = 1u << 30;  // ring_memory's address as the kernels see it
inline u32 shared_address(const void* p) { return (u32)((const u8*)p - ring_memory + SHARED_BASE); }
template <class T>
T& at_shared(u32 address) {
  if (address % alignof(T)) broken("misaligned access");
  return *(T*)(ring_memory + (i64)address - SHARED_BASE);
}

struct Barrier {
  int count, pending;
  i64 bytes;
  u32 parity;
};
inline std::map<u32, Barrier> barriers_by_address;
inline Barrier& barrier_at(u32 address) { return barriers_by_address.at(address); }
inline void settle(Barrier& b) {
  if (b.pending < 0) broken("too many arrivals");
  if (!b.pending && !b.bytes) b.parity ^= 1, b.pending = b.count, ++events;
}
inline void init_at(u32 address, u32 count) { barriers_by_address[address] = {(int)count, (int)count, 0, 0}; }
inline void arrive_at(u32 address) { --barrier_at(address).pending, settle(barrier_at(address)); }
inline void expect_at(u32 address, u32 bytes) { barrier_at(address).bytes += bytes, arrive_at(address); }
inline void wait_at(u32 address, u32 parity) {
  while (barrier_at(address).parity == parity) yield();
}
inline void copy_at(u32 to, const void* from, u32 bytes, u32 address) {
  if (((u64)from | to | bytes) & 15) broken("a bulk copy of something but whole 16 bytes");
  std::memcpy(&at_shared<u8>(to), from, bytes);
  barrier_at(address).bytes -= bytes, settle(barrier_at(address));
}

// -------------------------------------------------------------------------------------------------------- functions
template <class A, class B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return (T)a < (T)b ? (T)a : (T)b;
}
template <class A, class B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return (T)a > (T)b ? (T)a : (T)b;
}
template <class T>
T __shfl_sync(u32, T v, int source) {
  std::memcpy(&shown()[lane()][0], &v, sizeof v);
  warp_meets();
  std::memcpy(&v, &shown()[source & 31][0], sizeof v);
  warp_meets();
  return v;
}
template <class T>
T __shfl_xor_sync(u32 mask, T v, int d) {
  return __shfl_sync(mask, v, lane() ^ d);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline void __stcg(float* p, float v) { *p = v; }
inline u32 add_acquire_release(u32* p, u32 v) { return (*p += v) - v; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float a) { return (float)(1.0 / std::sqrt((double)a)); }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __int_as_float(int i) {
  float f;
  std::memcpy(&f, &i, 4);
  return f;
}
inline float __uint_as_float(u32 u) { return __int_as_float((int)u); }
inline int __float_as_int(float f) {
  int i;
  std::memcpy(&i, &f, 4);
  return i;
}
inline u32 __float_as_uint(float f) {
  u32 u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}
constexpr u32 WARP_ARRIVALS = 1;
inline int round_up_8(int n) { return (n + 7) & ~7; }
inline bool arrives(int lane) { return lane == 0; }
inline float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
inline float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
inline u32 to_bf16(float f) {
  const u32 u = __float_as_uint(f);
  return f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
inline u32 scale_bf16x2(u32 a, u32 factor) {
  return pack_bf16(bf16_low(a) * bf16_low(factor), bf16_high(a) * bf16_high(factor));
}
inline float from_e4m3(u8 b) {
  const int exponent = b >> 3 & 15, mantissa = b & 7;
  const float f = exponent ? std::ldexp(1 + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
  return b & 128 ? -f : f;
}
inline u32 to_e4m3(float f) {  // nearest even, saturating
  if (f != f) return 0x7f;
  const float size = std::fmin(std::fabs(f), 448.0f);
  u32 low = 0, high = 126;  // from_e4m3(low) <= size <= from_e4m3(high)
  while (high - low > 1) (from_e4m3((low + high) / 2) <= size ? low : high) = (low + high) / 2;
  const float below = size - from_e4m3(low), above = from_e4m3(high) - size;
  return (below < above || (below == above && low % 2 == 0) ? low : high) | (f < 0 ? 128 : 0);
}
inline u16 pack_e4m3(float low, float high) { return (u16)(to_e4m3(low) | to_e4m3(high) << 8); }
inline u32 transpose_8x8(u32 fragment) {
  const int g = lane() >> 2, t = lane() & 3;
  shown()[lane()][0] = fragment;
  warp_meets();
  auto element = [](int row, int column) {
    return (u32)(shown()[4 * row + column / 2][0] >> 16 * (column & 1)) & 0xffff;
  };
  const u32 turned = element(2 * t, g) | element(2 * t + 1, g) << 16;
  warp_meets();
  return turned;
}
