// expert_work.cuh: what the experts' kernels note of their own work, for the host to look at now and then
// (expert_work.py). route begins a product: it adds up the last one's time and notes its own first moment; every CTA of
// the product notes its end. No kernel and no wait is added: a thread of route that has nothing to do reads at the
// start what it writes at the end, and counts and ends are reductions whose answers nobody waits for.
#pragma once
#include "common.cuh"

constexpr u64 NO_PAIRS = ~0ull;

struct Work {
  u64 busy_ns;  // of all products but the last
  u64 began;    // the last one; NO_PAIRS: it computes nothing, and its time does not count
  u64 ended;    // the last one's latest end so far, or an earlier one's
};

__device__ __forceinline__ u64 now_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
__device__ __forceinline__ u64 load_work(const u64* p) {  // not from L1: others have written since
  u64 v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}

struct Beginning {
  Work before;
  u64 now;
};

// By the thread that calls note_product at its end; `work` null: nothing is noted.
__device__ __forceinline__ Beginning begin_product(const Work* work, bool notes) {
  Beginning b = {};
  if (work && notes)
    b.now = now_ns(), b.before = {load_work(&work->busy_ns), load_work(&work->began), load_work(&work->ended)};
  return b;
}

__device__ __forceinline__ void note_product(Work* work, const Beginning& b, int num_pairs) {
  if (!work) return;
  if (b.before.ended > b.before.began) work->busy_ns = b.before.busy_ns + (b.before.ended - b.before.began);
  work->began = num_pairs ? b.now : NO_PAIRS;
}

// By one thread of a CTA that has stored its last outputs.
__device__ __forceinline__ void end_product(Work* work) {
  if (work) asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(&work->ended), "l"(now_ns()) : "memory");
}

__device__ __forceinline__ void count_rows(u64* rows, int count) {
  if (count) asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(rows), "l"((u64)count) : "memory");
}
