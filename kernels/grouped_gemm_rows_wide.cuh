// grouped_gemm_rows_wide.cuh: fp8 tiles for many rows. Part of grouped_gemm.cu (ROWS_WIDE), same ring, queue and drain.
// The operands change places: rows are M, 64 for each warpgroup, and 128 outputs are N. A thread then holds two rows,
// so a scaled product costs one FFMA for each element and four factors for all, where outputs as M cost a factor for
// each element as well. Products, factors and order are the same, so are the bits. A warpgroup's 64 rows are one chunk,
// and their peaks stay within four lanes.
#pragma once
static_assert(FP8 && TILE == 128 && M_ROWS == 128 && K_BLOCKS_1 <= 64 && K_BLOCKS_2 <= 64, "one shape");

// acc[64 rows of this warpgroup, 128 outputs]; w13: 8 gates, their 8 ups, ... `idle`: the tile has no rows for us.
template <int GROUPS, int K_BLOCKS>
__device__ __forceinline__ void multiply_rows(float (&acc)[64], const float* low_scales, const float* high_scales,
                                              int group, bool idle, Ring& ring) {
  constexpr int KEPT = (K_BLOCKS + 31) / 32;
  const int lane = threadIdx.x & 31, row = group * 64 + ((threadIdx.x >> 5) & 3) * 16 + (lane >> 2);
  float kept_low[KEPT], kept_high[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    const int kb = min(lane + 32 * i, K_BLOCKS - 1);
    kept_low[i] = __ldg(low_scales + kb), kept_high[i] = __ldg(high_scales + kb);
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) acc[i] = 0.0f;
  for (int kb = 0; kb < K_BLOCKS; ++kb, ring.next(STAGES)) {
    const bool second_half = KEPT == 2 && kb >= 32;
    const float low = __shfl_sync(0xffffffffu, second_half ? kept_low[KEPT - 1] : kept_low[0], kb & 31);
    const float high = __shfl_sync(0xffffffffu, second_half ? kept_high[KEPT - 1] : kept_high[0], kb & 31);
    barrier_wait(at(barriers.full[ring.slot]), ring.parity);
    if (!idle) {
      const u64 a = operand_descriptor(stage_b(ring.slot) + group * 8192), b = operand_descriptor(stage_a(ring.slot));
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        float product[64];
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4 / GROUPS; ++k) Wgmma<128>::e4m3(product, a + 2 * (k + g * 2), b + 2 * (k + g * 2), k);
        wgmma_commit();
        const u32 scales = stage_scales(ring.slot) + (g * TILE + row) * 4;
        const float upper = load_shared_float(scales), lower = load_shared_float(scales + 32);
        const float factor[4] = {upper * low, lower * low, upper * high, lower * high};
        wgmma_wait<0>();
        pin_registers(product);
#pragma unroll
        for (int i = 0; i < 64; ++i) acc[i] = __fmaf_rn(product[i], factor[(i >> 2 & 1) * 2 + (i >> 1 & 1)], acc[i]);
      }
    }
    __syncwarp();
    if (lane == 0) hand_back(ring.slot);
  }
}

// This warpgroup's chunk of the tile; the ring moves on by all the tile's chunks.
__device__ __forceinline__ Ring own_chunk(Ring& chunks, int group, int num_rows) {
  Ring own = chunks;
  chunks.next(2);
  if (num_rows > CHUNK_ROWS) {
    if (group == 1) own = chunks;
    chunks.next(2);
  }
  return own;
}

// SwiGLU, quantised per row and 64 outputs, as 64 swizzled bytes a row.
__device__ __forceinline__ void store_swiglu_rows(float (&acc)[64], const Tile& tile, int group, const Ring& now,
                                                  const Outputs& out) {
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, upper = warp * 16 + (lane >> 2);
  float peak[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 64; i += 8)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      acc[i + q] = silu(acc[i + q]) * acc[i + 4 + q];
      peak[q >> 1] = fmaxf(peak[q >> 1], fabsf(acc[i + q]));
    }
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    peak[r] = fmaxf(peak[r], __shfl_xor_sync(0xffffffffu, peak[r], 1));
    peak[r] = fmaxf(peak[r], __shfl_xor_sync(0xffffffffu, peak[r], 2));
    const float scale = fp8_scale(peak[r]);
    inverse[r] = __frcp_rn(scale);
    const int row = group * 64 + upper + 8 * r;
    if ((lane & 3) == 0 && row < tile.num_rows)
      out.h_scales[(i64)tile.m_tile * out.capacity + tile.first_row + row] = scale;
  }
  fence_async_proxy();  // the scales are read by the copy engine
  barrier_wait(at(barriers.chunk_empty[now.slot]), now.parity ^ 1);
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = upper + 8 * r, piece = (i >> 1) ^ (row & 3);
      const u16 pair = pack_e4m3(acc[8 * i + 2 * r] * inverse[r], acc[8 * i + 2 * r + 1] * inverse[r]);
      const u32 address = chunk(now.slot) + row * CHUNK_PITCH_FP8 + (piece << 4) + (i & 1) * 8 + (lane & 3) * 2;
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(pair) : "memory");
    }
  chunk_written(now, lane);
}

__device__ __forceinline__ void store_output_rows(float (&acc)[64], const Ring& now) {
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
  barrier_wait(at(barriers.chunk_empty[now.slot]), now.parity ^ 1);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const u32 base = chunk(now.slot) + (warp * 16 + 8 * r + (lane & 7)) * CHUNK_PITCH + (lane >> 3) * 16;
#pragma unroll
    for (int j = 0; j < 16; j += 4) {
      u32 f[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) f[i] = pack_bf16(acc[4 * (j + i) + 2 * r], acc[4 * (j + i) + 2 * r + 1]);
      store_matrices(base + j * 16, f[0], f[1], f[2], f[3]);
    }
  }
  chunk_written(now, lane);
}

__device__ __forceinline__ void run_rows(const Tile& tile, int group, Ring& ring, Ring& chunks, const Outputs& out) {
  float acc[64];
  const bool idle = group * CHUNK_ROWS >= tile.num_rows;
  if (tile.second) {
    const float* scales = out.w2_scales + ((i64)tile.expert * (HIDDEN / 128) + tile.m_tile) * K_BLOCKS_2;
    multiply_rows<2, K_BLOCKS_2>(acc, scales, scales, group, idle, ring);
  } else {
    const float* scales = out.w13_scales + ((i64)tile.expert * (INTERMEDIATE / 64) + tile.m_tile / 2) * K_BLOCKS_1;
    multiply_rows<1, K_BLOCKS_1>(acc, scales, scales + INTERMEDIATE / 128 * K_BLOCKS_1, group, idle, ring);
  }
  const Ring now = own_chunk(chunks, group, tile.num_rows);
  if (idle) return;
  if (tile.second)
    store_output_rows(acc, now);
  else
    store_swiglu_rows(acc, tile, group, now, out);
}
