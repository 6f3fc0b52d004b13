// grouped_gemm.cu: y[r, k] = w2[e] @ (silu(w1[e] @ x[r]) * (w3[e] @ x[r])), e = the local expert of pair (r, k); one
// launch. The weights are the wide operand (M of wgmma m64nNk), an expert's rows are N: a tile is 64 or 128 outputs x
// up to TILE rows,
//   N cut to what the tile holds, so few rows cost few columns.  w13's gate and up rows are interleaved by 8 (pack.py):
//   a thread holds gate and up of the same output, and SwiGLU stays in registers.
// Persistent: CTAs claim tiles in order, first all of w13, then all of w2.  A w2 tile waits for the counter of its
// rows' w13
//   tiles; its weights are already under way meanwhile, so the stream from memory never stops between the two products.
//   No deadlock: a claimed w13 tile belongs to a running CTA and waits for nothing.
// Smem: ring of STAGES x (weights WARPGROUPS x 8 KiB + rows TILE x 128 B), bulk copies of packed blocks, one thread for
// each
//   operand.  Every output is accumulated over k in one order whatever the tile: a row does not depend on the others.
// FP8: e4m3 both sides, weights 128x128 block scales, rows one scale per 128 columns (w13) or 64 (w2), float32 across
// blocks. Needs: sm_90a; HIDDEN % 128 == 0, INTERMEDIATE % 64 == 0 (FP8: % 128); rows of an expert padded to 8 by
// permute.cu.
#include "hopper.cuh"

#ifndef HIDDEN
#define HIDDEN 4096
#define INTERMEDIATE 1536
#define WARPGROUPS 2
#define TILE 64
#define STAGES 8
#endif
#ifndef FP8
#define FP8 0
#endif

constexpr int BLOCK_K = FP8 ? 128 : 64;  // columns in 128 bytes
constexpr int K_BLOCKS_1 = HIDDEN / BLOCK_K, K_BLOCKS_2 = INTERMEDIATE / BLOCK_K;
constexpr int M_TILES_1 = 2 * INTERMEDIATE / (64 * WARPGROUPS), M_TILES_2 = HIDDEN / (64 * WARPGROUPS);
constexpr int A_BYTES = WARPGROUPS * 8192, B_BYTES = TILE * 128, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int SCALE_BYTES = FP8 ? TILE * 8 : 0;
constexpr int CONSUMERS = WARPGROUPS * 128, THREADS = CONSUMERS + 128;
constexpr int QUEUE = 4;
constexpr bool MOVE_REGISTERS = WARPGROUPS == 2 && TILE >= (FP8 ? 96 : 160);
static_assert(!FP8 || WARPGROUPS == 2, "an output group of 64 is one CTA's");
static_assert(TILE % 8 == 0 && TILE <= 256, "one wgmma covers the rows of a tile");

struct Tile {  // what a CTA does next; expert < 0: nothing
  int expert, entry, first_row, num_rows, m_tile, second;
};

struct Barriers {
  u64 full[STAGES], empty[STAGES], queue_full[QUEUE], queue_empty[QUEUE];
};

struct Ring {  // position in a ring of `size` slots; the parity flips at each turn
  int slot = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next(int size) {
    if (++slot == size) slot = 0, parity ^= 1;
  }
};

extern __shared__ __align__(1024) u8 ring_memory[];
__shared__ Barriers barriers;
__shared__ Tile queue[QUEUE];
#if FP8
__shared__ float peaks[8][TILE];
__shared__ float tile_scales[TILE];
#endif

// The swizzle is by address, so the ring begins at a multiple of 1024 (the launch asks for 1024 bytes more).
__device__ __forceinline__ u32 ring_base() { return (shared_address(ring_memory) + 1023) & ~1023u; }
__device__ __forceinline__ u32 stage_a(int slot) { return ring_base() + slot * STAGE_BYTES; }
__device__ __forceinline__ u32 stage_b(int slot) { return stage_a(slot) + A_BYTES; }
__device__ __forceinline__ u32 stage_scales(int slot) {
  return ring_base() + STAGES * STAGE_BYTES + slot * SCALE_BYTES;
}
__device__ __forceinline__ u32 at(const u64& barrier) { return shared_address(&barrier); }

// Claims tiles, tells the others through the queue, and streams weights.
__device__ __forceinline__ void produce_weights(const u8* w13, const u8* w2, const int4* tiles, int* state) {
  const u64 policy = evict_first_policy();
  const u32 num_entries = __ldg(state), total = num_entries * (M_TILES_1 + M_TILES_2);
  Ring ring, q;
  u32 t = atomicAdd((u32*)state + 3, 1);
  while (true) {
    Tile tile = {-1, 0, 0, 0, 0, 0};
    if (t < total) {
      tile.second = t >= num_entries * M_TILES_1;
      const u32 rest = tile.second ? t - num_entries * M_TILES_1 : t;
      tile.entry = rest / (tile.second ? M_TILES_2 : M_TILES_1);
      tile.m_tile = rest % (tile.second ? M_TILES_2 : M_TILES_1);
      const int4 rows = __ldg(tiles + tile.entry);
      tile.expert = rows.x, tile.first_row = rows.y, tile.num_rows = rows.z;
    }
    barrier_wait(at(barriers.queue_empty[q.slot]), q.parity ^ 1);
    queue[q.slot] = tile;
    barrier_arrive(at(barriers.queue_full[q.slot]));
    q.next(QUEUE);
    if (tile.expert < 0) return;
    t = atomicAdd((u32*)state + 3, 1);
    const int k_blocks = tile.second ? K_BLOCKS_2 : K_BLOCKS_1;
    const i64 block =
        (i64)tile.expert * ((tile.second ? HIDDEN : 2 * INTERMEDIATE) / 128) + tile.m_tile * WARPGROUPS / 2;
    const u8* source =
        (tile.second ? w2 : w13) + block * k_blocks * 16384 + (WARPGROUPS == 1 ? (tile.m_tile & 1) * 8192 : 0);
    for (int kb = 0; kb < k_blocks; ++kb, ring.next(STAGES)) {
      barrier_wait(at(barriers.empty[ring.slot]), ring.parity ^ 1);
      const u32 full = at(barriers.full[ring.slot]);
      barrier_arrive_expect(full, A_BYTES);
      bulk_load_once(stage_a(ring.slot), source + (i64)kb * 16384, A_BYTES, full, policy);
    }
  }
}

// Streams the rows of each tile: x for w13, the SwiGLU rows for w2 once they are complete.
__device__ __forceinline__ void produce_rows(const u8* x, const u8* h, const float* x_scales, const float* h_scales,
                                             const u32* ready, i64 capacity) {
  Ring ring, q;
  while (true) {
    barrier_wait(at(barriers.queue_full[q.slot]), q.parity);
    const Tile tile = queue[q.slot];
    barrier_arrive(at(barriers.queue_empty[q.slot]));
    q.next(QUEUE);
    if (tile.expert < 0) return;
    if (tile.second) {
#if WATCHDOG
      u32 tries = 0;
#endif
      while (load_acquire(ready + tile.entry) < M_TILES_1) {
        __nanosleep(64);
#if WATCHDOG
        if (++tries > (1u << 22)) __trap();
#endif
      }
      fence_async_proxy();
    }
    const int k_blocks = tile.second ? K_BLOCKS_2 : K_BLOCKS_1, rows = round_up_8(tile.num_rows);
    const u8* source = (tile.second ? h : x) + (i64)tile.first_row * 128;
    for (int kb = 0; kb < k_blocks; ++kb, ring.next(STAGES)) {
      barrier_wait(at(barriers.empty[ring.slot]), ring.parity ^ 1);
      const u32 full = at(barriers.full[ring.slot]);
#if FP8
      barrier_arrive_expect(full, rows * (tile.second ? 136 : 132));
      const float* scales = tile.second ? h_scales + 2 * kb * capacity : x_scales + kb * capacity;
      bulk_load(stage_scales(ring.slot), scales + tile.first_row, rows * 4, full);
      if (tile.second)
        bulk_load(stage_scales(ring.slot) + TILE * 4, scales + capacity + tile.first_row, rows * 4, full);
#else
      barrier_arrive_expect(full, rows * 128);
#endif
      bulk_load(stage_b(ring.slot), source + kb * capacity * 128, rows * 128, full);
    }
  }
}

struct Outputs {
  u8* h;            // [k-block of w2][capacity][128 B] swizzled
  float* h_scales;  // FP8: [INTERMEDIATE / 64][capacity]
  u16* y;           // [pair][HIDDEN]
  const int* pair_of_row;
  u32* ready;
  const float *w13_scales, *w2_scales;  // FP8: [expert][rows / 128][columns / 128]
  i64 capacity;
};

#if !FP8
// acc[64 outputs of this warpgroup, N rows] over all k-blocks; stages are handed back as soon as their products are
// done.
template <int N>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Tile& tile, int group, Ring& ring, bool leader) {
  const int k_blocks = tile.second ? K_BLOCKS_2 : K_BLOCKS_1;
  u32 previous = 0;
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
    if (kb && leader) barrier_arrive(previous);
    previous = at(barriers.empty[ring.slot]);
  }
  wgmma_wait<0>();
  if (leader) barrier_arrive(previous);
}
#else
// Each group of k columns has its own product, scaled in float32: acc += product * row scale * block scale.
template <int N, int GROUPS>
__device__ __forceinline__ void multiply_groups(float (&acc)[N / 2], int k_blocks, const float* low_scales,
                                                const float* high_scales, int group, Ring& ring, bool leader) {
  const int column = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
  float low = __ldg(low_scales), high = __ldg(high_scales);
  for (int kb = 0; kb < k_blocks; ++kb, ring.next(STAGES)) {
    const int following = min(kb + 1, k_blocks - 1);
    const float next_low = __ldg(low_scales + following), next_high = __ldg(high_scales + following);
    barrier_wait(at(barriers.full[ring.slot]), ring.parity);
    const u64 a = operand_descriptor(stage_a(ring.slot) + group * 8192), b = operand_descriptor(stage_b(ring.slot));
    const u32 scales = stage_scales(ring.slot) + column * 4;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      float product[N / 2];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4 / GROUPS; ++k) Wgmma<N>::e4m3(product, a + 2 * (k + g * 2), b + 2 * (k + g * 2), k);
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float2 s = load_shared_pair(scales + (g * TILE + j * 8) * 4);
        acc[4 * j] = __fmaf_rn(product[4 * j], s.x * low, acc[4 * j]);
        acc[4 * j + 1] = __fmaf_rn(product[4 * j + 1], s.y * low, acc[4 * j + 1]);
        acc[4 * j + 2] = __fmaf_rn(product[4 * j + 2], s.x * high, acc[4 * j + 2]);
        acc[4 * j + 3] = __fmaf_rn(product[4 * j + 3], s.y * high, acc[4 * j + 3]);
      }
    }
    if (leader) barrier_arrive(at(barriers.empty[ring.slot]));
    low = next_low, high = next_high;
  }
}
#endif

// SwiGLU of a w13 tile into the packed rows of w2: this warp's 8 outputs are one 16-byte piece (FP8: half of one).
template <int N>
__device__ __forceinline__ void store_swiglu(float (&acc)[N / 2], const Tile& tile, int group, const Outputs& out) {
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, row_in_group = lane >> 2;
#if !FP8
  const int half_block = tile.m_tile * WARPGROUPS + group;  // 32 outputs each
  const int block = half_block >> 1, piece = (half_block & 1) * 4 + warp;
  u8* base = out.h + ((i64)block * out.capacity + tile.first_row) * 128 + (lane & 3) * 4;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const u32 pair = transpose_8x8(pack_bf16(silu(acc[4 * j]) * acc[4 * j + 2], silu(acc[4 * j + 1]) * acc[4 * j + 3]));
    const int row = j * 8 + row_in_group;
    if (row < tile.num_rows) *(u32*)(base + row * 128 + ((piece ^ row_in_group) << 4)) = pair;
  }
#else
  float* peak_line = peaks[group * 4 + warp];
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    acc[4 * j] = silu(acc[4 * j]) * acc[4 * j + 2];
    acc[4 * j + 1] = silu(acc[4 * j + 1]) * acc[4 * j + 3];
    float p0 = fabsf(acc[4 * j]), p1 = fabsf(acc[4 * j + 1]);
#pragma unroll
    for (int d = 4; d < 32; d <<= 1) {
      p0 = fmaxf(p0, __shfl_xor_sync(0xffffffffu, p0, d));
      p1 = fmaxf(p1, __shfl_xor_sync(0xffffffffu, p1, d));
    }
    if (lane < 4) *(float2*)(peak_line + j * 8 + lane * 2) = make_float2(p0, p1);
  }
  named_barrier(1, CONSUMERS);
  for (int row = threadIdx.x - 128; row < N; row += CONSUMERS) {
    float peak = 0.0f;
#pragma unroll
    for (int w = 0; w < 8; ++w) peak = fmaxf(peak, peaks[w][row]);
    const float scale = fp8_scale(peak);
    tile_scales[row] = scale;
    if (row < tile.num_rows) out.h_scales[(i64)tile.m_tile * out.capacity + tile.first_row + row] = scale;
  }
  named_barrier(1, CONSUMERS);
  const int byte = (tile.m_tile & 1) * 64 + (group * 4 + warp) * 8, piece = byte >> 4;
  u8* base = out.h + ((i64)(tile.m_tile >> 1) * out.capacity + tile.first_row) * 128 + (byte & 8) + (lane & 3) * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 s = *(const float2*)(tile_scales + j * 8 + (lane & 3) * 2);
    const u32 q = pack_e4m3(__fdiv_rn(acc[4 * j], s.x), __fdiv_rn(acc[4 * j + 1], s.y));
    const u32 pair = transpose_8x8((q & 0xff) | (q & 0xff00) << 8);
    const int row = j * 8 + row_in_group;
    if (row < tile.num_rows) *(u16*)(base + row * 128 + ((piece ^ row_in_group) << 4)) = (u16)(pair | pair >> 8);
  }
#endif
  fence_async_proxy();
  named_barrier(1, CONSUMERS);
  if (threadIdx.x == 128) add_release(out.ready + tile.entry, 1);
}

// Rows of y, each at its pair's place; the warp's 16 outputs are 32 bytes of a row.
template <int N>
__device__ __forceinline__ void store_rows(float (&acc)[N / 2], const Tile& tile, int group, const Outputs& out) {
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, row_in_group = lane >> 2;
  u16* base = out.y + (tile.m_tile * WARPGROUPS + group) * 64 + warp * 16 + (lane & 3) * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const int row = j * 8 + row_in_group;
    const int pair = row < tile.num_rows ? __ldg(out.pair_of_row + tile.first_row + row) : -1;
    const u32 low = transpose_8x8(pack_bf16(acc[4 * j], acc[4 * j + 1]));
    const u32 high = transpose_8x8(pack_bf16(acc[4 * j + 2], acc[4 * j + 3]));
    if (pair >= 0) {
      *(u32*)(base + (i64)pair * HIDDEN) = low;
      *(u32*)(base + (i64)pair * HIDDEN + 8) = high;
    }
  }
}

template <int N>
__device__ __forceinline__ void run_tile(const Tile& tile, int group, Ring& ring, bool leader, const Outputs& out) {
  float acc[N / 2];
#if FP8
  if (tile.second) {
    const float* scales = out.w2_scales + ((i64)tile.expert * (HIDDEN / 128) + tile.m_tile) * K_BLOCKS_2;
    multiply_groups<N, 2>(acc, K_BLOCKS_2, scales, scales, group, ring, leader);
  } else {
    const float* scales = out.w13_scales + ((i64)tile.expert * (INTERMEDIATE / 64) + tile.m_tile / 2) * K_BLOCKS_1;
    multiply_groups<N, 1>(acc, K_BLOCKS_1, scales, scales + INTERMEDIATE / 128 * K_BLOCKS_1, group, ring, leader);
  }
#else
  multiply<N>(acc, tile, group, ring, leader);
#endif
  if (tile.second)
    store_rows<N>(acc, tile, group, out);
  else
    store_swiglu<N>(acc, tile, group, out);
}

// The narrowest instruction that covers the tile's rows.
__device__ __forceinline__ void run(const Tile& tile, int group, Ring& ring, bool leader, const Outputs& out) {
  const int n = tile.num_rows;
#define COVER(N)                                       \
  if constexpr (N <= TILE && (N >= 64 || TILE <= 128)) \
    if (n <= N) return run_tile<N>(tile, group, ring, leader, out);
  COVER(8) COVER(16) COVER(32) COVER(64) COVER(96) COVER(128) COVER(160) COVER(192) COVER(224) COVER(256)
#undef COVER
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm(const u8* w13, const u8* w2, const float* w13_scales, const float* w2_scales, const u8* x,
                 const float* x_scales, u8* h, float* h_scales, u16* y, const int* pair_of_row, const int4* tiles,
                 u32* ready, int* state, i64 capacity) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(at(barriers.full[i]), 2);                // one arrival for each operand
      barrier_init(at(barriers.empty[i]), WARPGROUPS * 4);  // one for each consumer warp
    }
    for (int i = 0; i < QUEUE; ++i) {
      barrier_init(at(barriers.queue_full[i]), 1);
      barrier_init(at(barriers.queue_empty[i]), WARPGROUPS * 4 + 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  allow_next_kernel();
  wait_for_previous_kernel();

  if (warp < 4) {
    if constexpr (MOVE_REGISTERS) registers_down<40>();
    if (warp == 0 && lane == 0) produce_weights(w13, w2, tiles, state);
    if (warp == 1 && lane == 0) produce_rows(x, h, x_scales, h_scales, ready, capacity);
  } else {
    if constexpr (MOVE_REGISTERS) registers_up<232>();
    const Outputs out = {h, h_scales, y, pair_of_row, ready, w13_scales, w2_scales, capacity};
    Ring ring, q;
    while (true) {
      barrier_wait(at(barriers.queue_full[q.slot]), q.parity);
      const Tile tile = queue[q.slot];
      __syncwarp();
      if (lane == 0) barrier_arrive(at(barriers.queue_empty[q.slot]));
      q.next(QUEUE);
      if (tile.expert < 0) break;
      run(tile, (warp >> 2) - 1, ring, lane == 0, out);
    }
  }
}
