// combine.cu: out[r] = sum over k of weights[r, k] * y[r, k], float32, in k order; bf16 rows in and out.
// Grid: (rows, column spans of 1024), 128 threads of 8 columns.  Pairs with a negative (or unmapped) id are skipped;
// their rows of y may hold anything.  Needs: HIDDEN % 8 == 0.
#include "common.cuh"

#ifndef HIDDEN
#define HIDDEN 4096
#endif
#ifndef TOP_K
#define TOP_K 8
#endif

extern "C" __global__ void __launch_bounds__(128)
    combine(const u16* __restrict__ y, const int* __restrict__ ids, const int* __restrict__ expert_map, int num_mapped,
            int num_local, const float* __restrict__ weights, u16* out) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const i64 row = blockIdx.x;
  const int column = blockIdx.y * 1024 + threadIdx.x * 8;
  if (column >= HIDDEN) return;
  int id[TOP_K];
  float weight[TOP_K];
#if TOP_K % 4 == 0
#pragma unroll
  for (int k = 0; k < TOP_K; k += 4) {
    *(int4*)(id + k) = __ldg((const int4*)(ids + row * TOP_K + k));
    *(float4*)(weight + k) = __ldg((const float4*)(weights + row * TOP_K + k));
  }
#else
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) id[k] = __ldg(ids + row * TOP_K + k), weight[k] = __ldg(weights + row * TOP_K + k);
#endif
  uint4 part[TOP_K];
  bool used[TOP_K];
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    if (expert_map) id[k] = (u32)id[k] < (u32)num_mapped ? __ldg(expert_map + id[k]) : -1;
    used[k] = (u32)id[k] < (u32)num_local;
    part[k] = make_uint4(0, 0, 0, 0);
    if (used[k]) part[k] = __ldcs((const uint4*)(y + (row * TOP_K + k) * HIDDEN + column));
  }
  float sum[8] = {};
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    if (!used[k]) continue;
    const u32 word[4] = {part[k].x, part[k].y, part[k].z, part[k].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] = __fmaf_rn(weight[k], bf16_low(word[i]), sum[2 * i]);
      sum[2 * i + 1] = __fmaf_rn(weight[k], bf16_high(word[i]), sum[2 * i + 1]);
    }
  }
  *(uint4*)(out + row * HIDDEN + column) = make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                                                      pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
}
