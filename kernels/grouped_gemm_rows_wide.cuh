// grouped_gemm_rows_wide.cuh: fp8 tiles for many rows. Part of grouped_gemm.cu (ROWS_WIDE), same ring, queue and drain.
// The operands change places: rows are M, and 128 outputs are N. A thread then holds two rows of each 64, so a scaled
// product costs one FFMA for each element and four factors for all, where outputs as M cost a factor for each element
// as well. Products, factors and order are the same, so are the bits.
// The tile's rows are chunks of 64; of the W warpgroups, g takes chunks g, g + W, ... PIPELINED (one chunk each): a
// warpgroup multiplies a group of columns while it scales and adds the one before. Otherwise the
// warpgroups overlap each other.
#pragma once
#ifndef PIPELINED
#define PIPELINED (TILE == 128 ? 2 : 0)
#endif
static_assert(FP8 && TILE % (64 * WARPGROUPS) == 0 && M_ROWS == 128, "whole chunks");
static_assert(K_BLOCKS_1 <= 64 && K_BLOCKS_2 <= 64, "two registers keep a row of block scales");
// A chunk's barrier is waited for by parity, which tells one turn from the next only. The warpgroup that fills a slot
// may be another than the one before, so none may be a tile ahead: the ring's slots must be fewer than a tile's
// k-blocks.
static_assert(K_BLOCKS_1 > STAGES && K_BLOCKS_2 > STAGES, "no warpgroup is a tile ahead of another");
constexpr int CHUNKS = TILE / 64 / WARPGROUPS;  // of a warpgroup

template <int GROUPS, int K_BLOCKS>
struct RowProducts {
  const int group, lane, row;  // row: this thread's first in a chunk of its warpgroup
  Ring& ring;                  // the next k-block to add
  Ring issued;                 // the next one to multiply
  // Lane l keeps the block scales of k-blocks l, l + 32: a load in the loop would cost its latency in every turn.
  static constexpr int KEPT = (K_BLOCKS + 31) / 32;
  float kept_low[KEPT], kept_high[KEPT];
  const u32 full, empty;   // addresses of the first barriers
  const u32 a_low, b_low;  // lower words of the first stage's operand descriptors
  const u32 scales;        // this thread's first row scale in the first stage

  __device__ __forceinline__ RowProducts(const float* low, const float* high, int group, Ring& ring)
      : group(group),
        lane(threadIdx.x & 31),
        row(group * 64 + ((threadIdx.x >> 5) & 3) * 16 + (lane >> 2)),
        ring(ring),
        issued(ring),
        full(keep(at(barriers.full[0]))),
        empty(keep(at(barriers.empty[0]))),
        a_low(keep((u32)operand_descriptor(stage_b(0) + group * 8192))),
        b_low(keep((u32)operand_descriptor(stage_a(0)))),
        scales(keep(stage_scales(0) + row * 4)) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int kb = min(lane + 32 * i, K_BLOCKS - 1);
      kept_low[i] = __ldg(low + kb), kept_high[i] = __ldg(high + kb);
    }
  }

  static __device__ __forceinline__ u64 descriptor(u32 low) { return operand_descriptor(0) & ~0xffffffffull | low; }

  __device__ __forceinline__ void wait_full(const Ring& r) const { barrier_wait(full + r.slot * 8, r.parity); }

  // Chunk `c`, group `g` of the k-block at `issued`.
  __device__ __forceinline__ void issue(float (&product)[64], int c, int g) {
    const u32 stage = issued.slot * (STAGE_BYTES / 16), a = a_low + stage + 512 * WARPGROUPS * c, b = b_low + stage;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4 / GROUPS; ++k)
      Wgmma<128>::e4m3(product, descriptor(a + 2 * (k + g * 2)), descriptor(b + 2 * (k + g * 2)), k);
    wgmma_commit();
  }

  // The factors of this thread's elements: [row of two][gate or up].
  __device__ __forceinline__ void load_factors(float (&factor)[4], int kb, int c, int g) {
    const bool second_half = KEPT == 2 && kb >= 32;
    const float low = __shfl_sync(0xffffffffu, second_half ? kept_low[KEPT - 1] : kept_low[0], kb & 31);
    const float high = __shfl_sync(0xffffffffu, second_half ? kept_high[KEPT - 1] : kept_high[0], kb & 31);
    const u32 address = scales + ring.slot * SCALE_BYTES + (g * TILE + c * 64 * WARPGROUPS) * 4;
    const float upper = load_shared_float(address), lower = load_shared_float(address + 32);
    factor[0] = upper * low, factor[1] = lower * low, factor[2] = upper * high, factor[3] = lower * high;
  }

  __device__ __forceinline__ void add(float (&acc)[64], const float (&product)[64], const float (&factor)[4]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i] = __fmaf_rn(product[i], factor[(i >> 2 & 1) * 2 + (i >> 1 & 1)], acc[i]);
  }

  __device__ __forceinline__ void give_back() {
    __syncwarp();
    if (arrives(lane)) hand_back_at(empty + ring.slot * 8);
  }

  __device__ __forceinline__ void finish_block() {
    give_back();
    ring.next(STAGES);
  }

  // The tile has no rows for this warpgroup.
  __device__ __forceinline__ void pass() {
    for (int kb = 0; kb < K_BLOCKS; ++kb) {
      wait_full(ring);
      finish_block();
    }
  }

  // One product in flight.
  template <int USED>
  __device__ __forceinline__ void run_alternating(float (&acc)[CHUNKS][64]) {
    for (int kb = 0; kb < K_BLOCKS; ++kb) {
      wait_full(ring);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          if (c >= USED) continue;
          float product[64], factor[4];
          issue(product, c, g);
          load_factors(factor, kb, c, g);
          wgmma_wait<0>();
          pin_registers(product);
          if (c == USED - 1 && g == GROUPS - 1) give_back();
          add(acc[c], product, factor);
        }
      ring.next(STAGES);
      issued = ring;
    }
  }

  // Two in flight, within a turn: ptxas serialises products that are in flight around a loop.
  __device__ __forceinline__ void run_pipelined(float (&acc)[64]) {
    constexpr int TURN = K_BLOCKS % (PIPELINED / GROUPS) == 0 ? PIPELINED / GROUPS : 1, STEPS = TURN * GROUPS;
    for (int first = 0; first < K_BLOCKS; first += TURN) {
      float product[2][64];
#pragma unroll
      for (int s = 0; s <= STEPS; ++s) {
        if (s < STEPS) {
          if (s % GROUPS == 0) wait_full(issued);
          issue(product[s & 1], 0, s % GROUPS);
          if (s % GROUPS == GROUPS - 1) issued.next(STAGES);
        }
        if (s == 0) continue;
        const int done = s - 1;
        float factor[4];
        load_factors(factor, first + done / GROUPS, 0, done % GROUPS);
        if (s < STEPS)
          wgmma_wait<1>();
        else
          wgmma_wait<0>();
        pin_registers(product[done & 1]);
        if (done % GROUPS == GROUPS - 1) finish_block();
        add(acc, product[done & 1], factor);
      }
    }
  }
};

// acc[chunk][64 rows, 128 outputs]; w13: 8 gates, their 8 ups, ... USED: this warpgroup's chunks that have rows.
template <int USED, int GROUPS, int K_BLOCKS>
__device__ __forceinline__ void multiply_rows(float (&acc)[CHUNKS][64], const float* low_scales,
                                              const float* high_scales, int group, Ring& ring) {
  RowProducts<GROUPS, K_BLOCKS> products(low_scales, high_scales, group, ring);
#pragma unroll
  for (int c = 0; c < USED; ++c)
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[c][i] = 0.0f;
  if constexpr (USED == 0)
    products.pass();
  else if constexpr (PIPELINED)
    products.run_pipelined(acc[0]);
  else
    products.template run_alternating<USED>(acc);
}

// Where the tile's chunk `c` stands in the ring of chunks.
__device__ __forceinline__ Ring chunk_at(Ring chunks, int c) {
  for (int i = 0; i < c; ++i) chunks.next(CHUNK_SLOTS);
  return chunks;
}

// SwiGLU, quantised per row and 64 outputs, as 64 swizzled bytes a row; the rows' scales stand behind them.
__device__ __forceinline__ void store_swiglu_rows(float (&acc)[64], const Ring& now) {
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, upper = warp * 16 + (lane >> 2);
  float peak[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 64; i += 8)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      acc[i + q] = silu(acc[i + q]) * acc[i + 4 + q];
      peak[q >> 1] = fmaxf(peak[q >> 1], fabsf(acc[i + q]));
    }
  float inverse[2], scales[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    peak[r] = fmaxf(peak[r], __shfl_xor_sync(0xffffffffu, peak[r], 1));
    peak[r] = fmaxf(peak[r], __shfl_xor_sync(0xffffffffu, peak[r], 2));
    const float scale = fp8_scale(peak[r]);
    inverse[r] = __frcp_rn(scale);
    scales[r] = scale;
  }
  barrier_wait(at(barriers.chunk_empty[now.slot]), now.parity ^ 1);
  if ((lane & 3) == 0) {
    const u32 address = chunk(now.slot) + CHUNK_SCALES + upper * 4;
    store_shared_float(address, scales[0]), store_shared_float(address + 32, scales[1]);
  }
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

template <int USED>
__device__ __forceinline__ void run_chunks(const Tile& tile, int group, Ring& ring, const Ring& chunks,
                                           const Outputs& out) {
  float acc[CHUNKS][64];
  if (tile.second) {
    const float* scales = out.w2_scales + ((i64)tile.expert * (HIDDEN / 128) + tile.m_tile) * K_BLOCKS_2;
    multiply_rows<USED, 2, K_BLOCKS_2>(acc, scales, scales, group, ring);
#pragma unroll
    for (int c = 0; c < USED; ++c) store_output_rows(acc[c], chunk_at(chunks, WARPGROUPS * c + group));
  } else {
    const float* scales = out.w13_scales + ((i64)tile.expert * (INTERMEDIATE / 64) + tile.m_tile / 2) * K_BLOCKS_1;
    multiply_rows<USED, 1, K_BLOCKS_1>(acc, scales, scales + INTERMEDIATE / 128 * K_BLOCKS_1, group, ring);
#pragma unroll
    for (int c = 0; c < USED; ++c) store_swiglu_rows(acc[c], chunk_at(chunks, WARPGROUPS * c + group));
  }
}

__device__ __forceinline__ void run_rows(const Tile& tile, int group, Ring& ring, Ring& chunks, const Outputs& out) {
  const int tile_chunks = (tile.num_rows + CHUNK_ROWS - 1) / CHUNK_ROWS,
            used = (tile_chunks + WARPGROUPS - 1 - group) / WARPGROUPS;
  if (CHUNKS == 2 && used == 2)
    run_chunks<CHUNKS>(tile, group, ring, chunks, out);
  else if (used)
    run_chunks<1>(tile, group, ring, chunks, out);
  else
    run_chunks<0>(tile, group, ring, chunks, out);
  chunks = chunk_at(chunks, tile_chunks);
}
