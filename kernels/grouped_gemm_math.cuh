// grouped_gemm_math.cuh: acc[64 outputs of this warpgroup, N rows] of one tile, over all k-blocks of the ring.
// Part of grouped_gemm.cu.  A stage is handed back as soon as its products are done.
#pragma once

#if !FP8
// K-blocks whose products are under way while the next one's begin. Few rows: a product is short, its start is not.
constexpr int IN_FLIGHT = TILE == 8 && STAGES > 4 ? 3 : 1;

__device__ __forceinline__ int slot_before(int slot, int steps) {
  return slot >= steps ? slot - steps : slot + STAGES - steps;
}

template <int N>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Tile& tile, int group, Ring& ring, const Outputs&) {
  const int k_blocks = tile.second ? K_BLOCKS_2 : K_BLOCKS_1;
  const bool leader = arrives(threadIdx.x & 31);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;  // else ptxas keeps every width's registers alive between tiles
  for (int kb = 0; kb < k_blocks; ++kb, ring.next(STAGES)) {
    barrier_wait(at(barriers.full[ring.slot]), ring.parity);
    const u64 a = operand_descriptor(stage_a(ring.slot) + group * 8192), b = operand_descriptor(stage_b(ring.slot));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) Wgmma<N>::bf16(acc, a + 2 * k, b + 2 * k, 1);
    wgmma_commit();
    wgmma_wait<IN_FLIGHT>();
    if (kb >= IN_FLIGHT && leader) hand_back(slot_before(ring.slot, IN_FLIGHT));
  }
  wgmma_wait<0>();
  pin_registers(acc);
  if (leader)
    for (int i = min(IN_FLIGHT, k_blocks); i; --i) hand_back(slot_before(ring.slot, i));
}
#else
// A group of k columns has its own product, scaled in float32: acc += product * row scale * block scale. Two products
// are in flight: while one is scaled and added, the tensor cores make the next.
template <int N, int GROUPS, int K_BLOCKS>
struct ScaledSum {
  float (&acc)[N / 2];
  const int group, lane;
  Ring& ring;   // the next k-block to add
  Ring issued;  // the next one to multiply
  // Lane l keeps the block scales of k-blocks l, l + 32, ...: a load in the loop would cost its latency in every turn.
  static constexpr int KEPT = (K_BLOCKS + 31) / 32;
  float kept_low[KEPT], kept_high[KEPT];

  __device__ __forceinline__ void keep_scales(const float* low, const float* high) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int kb = min(lane + 32 * i, K_BLOCKS - 1);
      kept_low[i] = __ldg(low + kb), kept_high[i] = __ldg(high + kb);
    }
  }

  template <int PART>
  __device__ __forceinline__ void issue(float (&product)[N / 2]) {
    if constexpr (PART == 0) barrier_wait(at(barriers.full[issued.slot]), issued.parity);
    const u64 a = operand_descriptor(stage_a(issued.slot) + group * 8192) + 4 * PART;
    const u64 b = operand_descriptor(stage_b(issued.slot)) + 4 * PART;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4 / GROUPS; ++k) Wgmma<N>::e4m3(product, a + 2 * k, b + 2 * k, k);
    wgmma_commit();
    if constexpr (PART == GROUPS - 1) issued.next(STAGES);
  }

  template <int PART>
  __device__ __forceinline__ void add(float (&product)[N / 2], int kb) {
    pin_registers(product);
    float low = __shfl_sync(0xffffffffu, kept_low[0], kb & 31), high = __shfl_sync(0xffffffffu, kept_high[0], kb & 31);
#pragma unroll
    for (int i = 1; i < KEPT; ++i) {
      const float l = __shfl_sync(0xffffffffu, kept_low[i], kb & 31);
      const float h = __shfl_sync(0xffffffffu, kept_high[i], kb & 31);
      if (kb >= 32 * i) low = l, high = h;
    }
    const u32 scales = stage_scales(ring.slot) + ((lane & 3) * 2 + PART * TILE) * 4;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 s = load_shared_pair(scales + j * 32);
      acc[4 * j] = __fmaf_rn(product[4 * j], s.x * low, acc[4 * j]);
      acc[4 * j + 1] = __fmaf_rn(product[4 * j + 1], s.y * low, acc[4 * j + 1]);
      acc[4 * j + 2] = __fmaf_rn(product[4 * j + 2], s.x * high, acc[4 * j + 2]);
      acc[4 * j + 3] = __fmaf_rn(product[4 * j + 3], s.y * high, acc[4 * j + 3]);
    }
    if constexpr (PART == GROUPS - 1) {
      __syncwarp();
      if (arrives(lane)) hand_back(ring.slot);
      ring.next(STAGES);
    }
  }

  static constexpr int OTHER = GROUPS - 1, STEP = 3 - GROUPS;  // of two products: the other's part; their k-blocks

  // Two products whose instructions alternate, so that neither waits for its own last sum.
  __device__ __forceinline__ void issue_two(float (&product)[2][N / 2]) {
    u64 a[2], b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == 0 || GROUPS == 1) barrier_wait(at(barriers.full[issued.slot]), issued.parity);
      a[i] = operand_descriptor(stage_a(issued.slot) + group * 8192) + 4 * OTHER * i;
      b[i] = operand_descriptor(stage_b(issued.slot)) + 4 * OTHER * i;
      if (i == 1 || GROUPS == 1) issued.next(STAGES);
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4 / GROUPS; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i) Wgmma<N>::e4m3(product[i], a[i] + 2 * k, b[i] + 2 * k, k);
    wgmma_commit();
  }

  __device__ __forceinline__ void add_two(float (&product)[2][N / 2], int kb) {
    add<0>(product[0], kb);
    add<OTHER>(product[1], kb + STEP - 1);
  }

  // Few rows: a product is short but for its chain of waits, so four are in flight.
  __device__ __forceinline__ void run_four() {
    float even[2][N / 2], odd[2][N / 2];
    for (int kb = 0; kb < K_BLOCKS; kb += 2 * STEP) {
      issue_two(even);
      issue_two(odd);
      wgmma_wait<1>();
      add_two(even, kb);
      wgmma_wait<0>();
      add_two(odd, kb + STEP);
    }
  }

  // GROUPS 2: the parts of a k-block alternate; GROUPS 1: k-blocks do.
  __device__ __forceinline__ void run() {
    static_assert(K_BLOCKS % STEP == 0, "whole turns");
    float even[N / 2], odd[N / 2];
    for (int kb = 0; kb < K_BLOCKS; kb += STEP) {  // ptxas serialises products that are in flight around a loop
      issue<0>(even);
      issue<OTHER>(odd);
      wgmma_wait<1>();
      add<0>(even, kb);
      wgmma_wait<0>();
      add<OTHER>(odd, kb + STEP - 1);
    }
  }
};

template <int N, int GROUPS, int K_BLOCKS>
__device__ __forceinline__ void multiply_groups(float (&acc)[N / 2], const float* low_scales, const float* high_scales,
                                                int group, Ring& ring) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
  ScaledSum<N, GROUPS, K_BLOCKS> sum{acc, group, (int)(threadIdx.x & 31), ring, ring};
  sum.keep_scales(low_scales, high_scales);
  if constexpr (TILE == 8 && K_BLOCKS % (2 * sum.STEP) == 0 && STAGES >= 2 * sum.STEP)
    sum.run_four();
  else
    sum.run();
}

template <int N>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Tile& tile, int group, Ring& ring,
                                         const Outputs& out) {
  if (tile.second) {
    const float* scales = out.w2_scales + ((i64)tile.expert * (HIDDEN / 128) + tile.m_tile) * K_BLOCKS_2;
    multiply_groups<N, 2, K_BLOCKS_2>(acc, scales, scales, group, ring);
  } else {
    const float* scales = out.w13_scales + ((i64)tile.expert * (INTERMEDIATE / 64) + tile.m_tile / 2) * K_BLOCKS_1;
    multiply_groups<N, 1, K_BLOCKS_1>(acc, scales, scales + INTERMEDIATE / 128 * K_BLOCKS_1, group, ring);
  }
}
#endif
