// expert_work.cuh: what the experts' kernels note of their own work, for the host to look at now and then
// (expert_work.py). route begins a product: it adds up the last one's time and notes its own first moment; every CTA of
// the product notes its end. No kernel and no wait is added: a thread of route asks at the start for what it adds to at
// the end, and counts and ends are reductions whose answers nobody waits for.
#pragma once
#include "common.cuh"

constexpr u64 NO_PAIRS = ~0ull;

struct __align__(16) Work {
  u64 busy_ns;  // of all products but the last
  u64 began;    // the last one; NO_PAIRS: it computes nothing, and its time does not count
  u64 ended;    // the last one's latest end so far, or an earlier one's
  u64 unused;
};

__device__ __forceinline__ u64 now_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// By the thread that calls note_product at its end; `work` null: nothing is noted. What it reads comes into `kept`, in
// shared memory, while it goes on: registers are scarce.
__device__ __forceinline__ void begin_product(const Work* work, Work& kept, u64& now) {
  if (!work) return;
  const u32 to = (u32)__cvta_generic_to_shared(&kept);
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;\n"  // from L2: others have written since
      "cp.async.cg.shared.global [%0 + 16], [%1 + 16], 16;" ::"r"(to),
      "l"(work)
      : "memory");
  now = now_ns();
}

__device__ __forceinline__ void note_product(Work* work, const Work& kept, u64 now, int num_pairs) {
  if (!work) return;
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (kept.ended > kept.began) work->busy_ns = kept.busy_ns + (kept.ended - kept.began);
  work->began = num_pairs ? now : NO_PAIRS;
}

// By one thread of a CTA that has stored its last outputs.
__device__ __forceinline__ void end_product(Work* work) {
  if (work) asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(&work->ended), "l"(now_ns()) : "memory");
}

__device__ __forceinline__ void count_rows(u64* rows, int count) {
  if (count) asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(rows), "l"((u64)count) : "memory");
}
