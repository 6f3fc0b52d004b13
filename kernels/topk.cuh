// topk.cuh: one warp: softmax over a row of logits, its TOP_K largest, ties to the lower expert: gate_topk.cu's result
// bit for bit, with a round of the search in two warp-wide reductions of integers instead of ten shuffles.
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

// logit[i] of expert i * 32 + lane (-inf where there is none) -> in lane k < TOP_K the k-th expert and its weight; a
// row without a softmax (NaN or infinity) has experts -1.
__device__ __forceinline__ void softmax_topk(const float (&logit)[PER_LANE], int& my_id, float& my_weight) {
  const int lane = threadIdx.x & 31;
  float p[PER_LANE], peak = __int_as_float(0xff800000), total = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) peak = fmaxf(peak, logit[i]);
#pragma unroll
  for (int d = 16; d; d >>= 1) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, d));
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
  float kept = 0.0f;
  my_weight = 0.0f, my_id = -1;
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    u32 best = 0, best_e = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (left[i] > best) best = left[i], best_e = i * 32 + lane;
    const u32 highest = __reduce_max_sync(0xffffffffu, best);
    best_e = __reduce_min_sync(0xffffffffu, best == highest ? best_e : 0xffffffffu);
    const float weight = __uint_as_float(highest - 1);
    kept += weight;
    if (lane == k) my_weight = weight, my_id = (int)best_e;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (i * 32 + lane == (int)best_e) left[i] = 0;
  }
  if (RENORMALIZE) my_weight = __fdiv_rn(my_weight, kept);
  if (!valid) my_id = -1, my_weight = __int_as_float(0x7fc00000);
}
