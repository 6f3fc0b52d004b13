// topk.cuh: one warp: softmax over a row of logits, its TOP_K largest, ties to the lower expert: gate_topk.cu's result
// bit for bit, with a round of the search in two warp-wide reductions of integers instead of ten shuffles, over the
// lanes' largest: each lane keeps its own in order.
#pragma once
#include "common.cuh"

#ifndef NUM_EXPERTS
#define NUM_EXPERTS 128
#endif
#ifndef TOP_K
#define TOP_K 8
#endif
#ifndef RENORMALIZE
#define RENORMALIZE 1
#endif

constexpr int PER_LANE = (NUM_EXPERTS + 31) / 32;

// Integers that order as the numbers do, and back.
__device__ __forceinline__ int ordered(float f) {
  const int bits = __float_as_int(f);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float unordered(int i) { return __int_as_float(i ^ (i >> 31 & 0x7fffffff)); }

template <class T>
__device__ __forceinline__ void swap(T& a, T& b) {
  const T c = a;
  a = b, b = c;
}

// logit[i] of expert i * 32 + lane (-inf where there is none) -> in lane k < TOP_K the k-th expert and its weight; a
// row without a softmax (NaN or infinity) has experts -1.
__device__ __forceinline__ void softmax_topk(const float (&logit)[PER_LANE], int& my_id, float& my_weight) {
  const int lane = threadIdx.x & 31;
  float p[PER_LANE], total = 0.0f;
  int highest_logit = (int)0x80000000;  // a NaN orders above or below all numbers; `total` tells of it either way
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) highest_logit = max(highest_logit, ordered(logit[i]));
  const float peak = unordered(__reduce_max_sync(0xffffffffu, highest_logit));
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    p[i] = i * 32 + lane < NUM_EXPERTS ? expf(logit[i] - peak) : 0.0f;
    total += p[i];
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(0xffffffffu, total, d);
  const bool valid = total == total;
  u32 left[PER_LANE];  // a probability's bits, which order as it does; 0 = taken, or no expert. So 1 more than the
                       // bits.
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i)
    left[i] = valid && i * 32 + lane < NUM_EXPERTS ? __float_as_uint(__fdiv_rn(p[i], total)) + 1 : 0;
  int expert[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) expert[i] = i * 32 + lane;
#pragma unroll
  for (int end = 1; end < PER_LANE; ++end)  // largest first; equals stay in order
#pragma unroll
    for (int i = end; i > 0; --i)
      if (left[i] > left[i - 1]) swap(left[i], left[i - 1]), swap(expert[i], expert[i - 1]);
  float kept = 0.0f;
  my_weight = 0.0f, my_id = -1;
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    const u32 highest = __reduce_max_sync(0xffffffffu, left[0]);
    const int best = (int)__reduce_min_sync(0xffffffffu, left[0] == highest ? (u32)expert[0] : 0xffffffffu);
    const float weight = __uint_as_float(highest - 1);
    kept += weight;
    if (lane == k) my_weight = weight, my_id = best;
    const bool taken = best == expert[0];
#pragma unroll
    for (int i = 1; i < PER_LANE; ++i) {
      left[i - 1] = taken ? left[i] : left[i - 1];
      expert[i - 1] = taken ? expert[i] : expert[i - 1];
    }
    left[PER_LANE - 1] = taken ? 0 : left[PER_LANE - 1];
    expert[PER_LANE - 1] = taken ? -1 : expert[PER_LANE - 1];
  }
  if (RENORMALIZE) my_weight = __fdiv_rn(my_weight, kept);
  if (!valid) my_id = -1, my_weight = __int_as_float(0x7fc00000);
}
