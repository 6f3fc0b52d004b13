// gate_topk.cu: p = softmax(logits) in float32; the TOP_K largest, ties to the lower expert; optionally renormalised to
// sum 1. One warp per token, NUM_EXPERTS / 32 values a lane in registers; TOP_K rounds of a warp-wide maximum. Needs:
// NUM_EXPERTS <= 1024, TOP_K <= 32.
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
#ifndef LOGITS_BF16
#define LOGITS_BF16 0
#endif

constexpr int PER_LANE = (NUM_EXPERTS + 31) / 32;

extern "C" __global__ void __launch_bounds__(128)
    gate_topk(const void* __restrict__ logits, int num_tokens, const int* __restrict__ num_valid, int* topk_ids,
              float* topk_weights, int* counts) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31;
  const i64 token = (i64)blockIdx.x * 4 + (threadIdx.x >> 5);
  if (token >= num_tokens) return;
  const float lowest = __int_as_float(0xff800000);
  float p[PER_LANE], peak = lowest, total = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const int e = i * 32 + lane;
    p[i] = lowest;
    if (e < NUM_EXPERTS) {
#if LOGITS_BF16
      p[i] = __uint_as_float((u32)__ldg((const u16*)logits + token * NUM_EXPERTS + e) << 16);
#else
      p[i] = __ldg((const float*)logits + token * NUM_EXPERTS + e);
#endif
    }
    peak = fmaxf(peak, p[i]);
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, d));
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    p[i] = i * 32 + lane < NUM_EXPERTS ? expf(p[i] - peak) : 0.0f;
    total += p[i];
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(0xffffffffu, total, d);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) p[i] = i * 32 + lane < NUM_EXPERTS ? __fdiv_rn(p[i], total) : -1.0f;

  float kept = 0.0f, my_weight = 0.0f;
  int my_id = -1;
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    float best = -2.0f;
    int best_e = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (p[i] > best) best = p[i], best_e = i * 32 + lane;
#pragma unroll
    for (int d = 16; d; d >>= 1) {
      const float other = __shfl_xor_sync(0xffffffffu, best, d);
      const int other_e = __shfl_xor_sync(0xffffffffu, best_e, d);
      if (other > best || (other == best && other_e < best_e)) best = other, best_e = other_e;
    }
    kept += best;
    if (lane == k) my_weight = best, my_id = best_e;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (i * 32 + lane == best_e) p[i] = -1.0f;
  }
  if (lane < TOP_K) {
    if (RENORMALIZE) my_weight = __fdiv_rn(my_weight, kept);
    bool valid = my_id >= 0 && my_id < NUM_EXPERTS;       // a row of NaN has no largest: it is routed nowhere
    if (num_valid && token >= *num_valid) valid = false;  // padding of a captured step
    topk_ids[token * TOP_K + lane] = valid ? my_id : -1;
    topk_weights[token * TOP_K + lane] = my_weight;
    if (counts && valid) atomicAdd(counts + my_id, 1);
  }
}
