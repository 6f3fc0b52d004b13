// grouped_gemm_math.cuh: acc[64 outputs of this warpgroup, N rows] of one tile, over all k-blocks of the ring.
// Part of grouped_gemm.cu.  A stage is handed back as soon as its products are done.
#pragma once

#if !FP8
template <int N>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Tile& tile, int group, Ring& ring, const Outputs&) {
  const int k_blocks = tile.second ? K_BLOCKS_2 : K_BLOCKS_1;
  const bool leader = (threadIdx.x & 31) == 0;
  int previous = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;  // else ptxas keeps every width's registers alive between tiles
  for (int kb = 0; kb < k_blocks; ++kb, ring.next(STAGES)) {
    barrier_wait(at(barriers.full[ring.slot]), ring.parity);
    const u64 a = operand_descriptor(stage_a(ring.slot) + group * 8192), b = operand_descriptor(stage_b(ring.slot));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) Wgmma<N>::bf16(acc, a + 2 * k, b + 2 * k, 1);
    wgmma_commit();
    wgmma_wait<1>();
    if (kb && leader) hand_back(previous);
    previous = ring.slot;
  }
  wgmma_wait<0>();
  if (leader) hand_back(previous);
}
#else
// Each group of k columns has its own product, scaled in float32: acc += product * row scale * block scale.
template <int N, int GROUPS>
__device__ __forceinline__ void multiply_groups(float (&acc)[N / 2], int k_blocks, const float* low_scales,
                                                const float* high_scales, int group, Ring& ring) {
  const int column = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
  // Lane l keeps the block scales of k-blocks l, l + 32, ...: a load in the loop would cost its latency in every turn.
  constexpr int KEPT = ((K_BLOCKS_1 > K_BLOCKS_2 ? K_BLOCKS_1 : K_BLOCKS_2) + 31) / 32;
  const int lane = threadIdx.x & 31;
  float kept_low[KEPT], kept_high[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    const int kb = min(lane + 32 * i, k_blocks - 1);
    kept_low[i] = __ldg(low_scales + kb), kept_high[i] = __ldg(high_scales + kb);
  }
  for (int kb = 0; kb < k_blocks; ++kb, ring.next(STAGES)) {
    float low = __shfl_sync(0xffffffffu, kept_low[0], kb & 31), high = __shfl_sync(0xffffffffu, kept_high[0], kb & 31);
#pragma unroll
    for (int i = 1; i < KEPT; ++i) {
      const float l = __shfl_sync(0xffffffffu, kept_low[i], kb & 31);
      const float h = __shfl_sync(0xffffffffu, kept_high[i], kb & 31);
      if (kb >= 32 * i) low = l, high = h;
    }
    barrier_wait(at(barriers.full[ring.slot]), ring.parity);
    const u64 a = operand_descriptor(stage_a(ring.slot) + group * 8192), b = operand_descriptor(stage_b(ring.slot));
    const u32 scales = stage_scales(ring.slot) + column * 4;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      float product[N / 2];
      float2 row_scales[N / 8];  // on their way while the tensor cores work
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4 / GROUPS; ++k) Wgmma<N>::e4m3(product, a + 2 * (k + g * 2), b + 2 * (k + g * 2), k);
      wgmma_commit();
#pragma unroll
      for (int j = 0; j < N / 8; ++j) row_scales[j] = load_shared_pair(scales + (g * TILE + j * 8) * 4);
      wgmma_wait<0>();
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float2 s = row_scales[j];
        acc[4 * j] = __fmaf_rn(product[4 * j], s.x * low, acc[4 * j]);
        acc[4 * j + 1] = __fmaf_rn(product[4 * j + 1], s.y * low, acc[4 * j + 1]);
        acc[4 * j + 2] = __fmaf_rn(product[4 * j + 2], s.x * high, acc[4 * j + 2]);
        acc[4 * j + 3] = __fmaf_rn(product[4 * j + 3], s.y * high, acc[4 * j + 3]);
      }
    }
    __syncwarp();
    if (lane == 0) hand_back(ring.slot);
  }
}

template <int N>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Tile& tile, int group, Ring& ring,
                                         const Outputs& out) {
  if (tile.second) {
    const float* scales = out.w2_scales + ((i64)tile.expert * (HIDDEN / 128) + tile.m_tile) * K_BLOCKS_2;
    multiply_groups<N, 2>(acc, K_BLOCKS_2, scales, scales, group, ring);
  } else {
    const float* scales = out.w13_scales + ((i64)tile.expert * (INTERMEDIATE / 64) + tile.m_tile / 2) * K_BLOCKS_1;
    multiply_groups<N, 1>(acc, K_BLOCKS_1, scales, scales + INTERMEDIATE / 128 * K_BLOCKS_1, group, ring);
  }
}
#endif
