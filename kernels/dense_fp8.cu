// dense_fp8.cu: y = x @ w^T for 1 to 64 rows: bf16 rows, e4m3 weights with a float32 scale for each 128x128 block,
// float32 sums, bf16 out (W8A16: exact to the checkpoint, rows are not quantised).  mma.sync m16n8k16, sm_80+. Reading
// w is all the work, so w is one stream: its blocks lie in memory output tile after output tile (pack.py), and
//   each CTA takes an equal run of blocks, wherever a tile begins.  A tile that several CTAs share: each leaves its
//   sums in memory, and the last one to come adds them up in the order of k.  Nobody waits for anybody.
// Smem: ring of STAGES x (2 blocks of 16 KiB, the same 256 columns of the rows), then the exchange of partial sums. The
//   first slots are filled with weights before the kernel before this one has ended.
// Warps: one brings weights, one rows.  Of the others warp (m, part) multiplies 16 or 32 outputs by every second block
// of
//   the run.  Weights are the wide operand; a piece of 16 bytes, 16 columns of an output, is one step of k: lane t of
//   four has columns 4 t to 4 t + 3, of weights by ldmatrix and of rows by one load of 8 bytes.
// An output's sums have one order whatever the number of rows: a row's bits depend on that row and w alone.
// Needs: K % 128 == 0, num_outputs % 128 == 0.  Idea: stream-K (Osama et al., 2023).
#include "e4m3.cuh"

#ifndef K
#define K 4096
#define TILE 16
#define STAGES 5
#endif

constexpr int K_BLOCKS = K / 128, PARTS = 2, BLOCK_BYTES = 16384;
constexpr int SUBS = TILE >= 32 ? 2 : 1;  // times 16 outputs of a warp: twice where reading rows would bind
constexpr int M_WARPS = 8 / SUBS, CONSUMERS = PARTS * M_WARPS, THREADS = (CONSUMERS + 2) * 32;
constexpr int N_TILES = TILE / 8;
constexpr int ROW_PITCH = PARTS * 256 + 32;  // loads of 8 bytes by half a warp: four rows, no bank twice
constexpr int A_BYTES = PARTS * BLOCK_BYTES, STAGE_BYTES = A_BYTES + TILE * ROW_PITCH;
constexpr int LAST_BARRIER = 15;  // of the warps of part 0
static_assert(K % 128 == 0 && (TILE == 8 || TILE == 16 || TILE == 32 || TILE == 64), "dense_fp8.cu: K or TILE");

extern __shared__ __align__(128) u8 ring_memory[];
__shared__ u64 full[STAGES], empty[STAGES];
__shared__ u32 is_last;

__device__ __forceinline__ u32 stage(int slot) { return shared_address(ring_memory) + slot * STAGE_BYTES; }
__device__ __forceinline__ float* exchange(int m_warp) {
  return (float*)(ring_memory + STAGES * STAGE_BYTES) + m_warp * 16 * TILE;
}

// Blocks [first, last) of output tile m.
struct Segment {
  u32 m, first, last;
};

struct Share {  // of the blocks of w: a CTA's run, and whose a block is
  u32 total;
  __device__ __forceinline__ u32 begin(u32 cta) const { return (u64)cta * total / gridDim.x; }
  __device__ __forceinline__ u32 owner(u32 block) const { return ((u64)(block + 1) * gridDim.x - 1) / total; }
};

__device__ __forceinline__ Segment segment_at(u32 block, u32 end) {
  const u32 m = block / K_BLOCKS, first = block % K_BLOCKS;
  return {m, first, min((u32)K_BLOCKS, first + end - block)};
}

// One warp. Reads nothing that the kernel before wrote.
__device__ __forceinline__ void produce_weights(const u8* w, u32 begin, u32 end, int lane) {
  Ring ring;
  for (u32 block = begin; block < end;) {
    const Segment s = segment_at(block, end);
    for (u32 k = s.first; k < s.last; k += PARTS, ring.next(STAGES)) {
      const u32 bytes = min((u32)PARTS, s.last - k) * BLOCK_BYTES;
      barrier_wait(empty[ring.slot], ring.parity ^ 1);
      expect_bytes(full[ring.slot], bytes, lane);
      copy_by_warp<(TILE < 64)>(stage(ring.slot), w + (i64)(block + k - s.first) * BLOCK_BYTES, bytes, full[ring.slot],
                                lane);
      copies_arrive(full[ring.slot]);
    }
    block += s.last - s.first;
  }
}

// One warp. Rows from num_rows on stay whatever was in memory: a column of a product sees its own row alone.
__device__ __forceinline__ void produce_rows(const u16* x, int num_rows, u32 begin, u32 end, int lane) {
  const u16* source = x + (i64)min(lane, num_rows - 1) * K;
  const u16* beyond = x + (i64)min(32 + lane, num_rows - 1) * K;
  Ring ring;
  for (u32 block = begin; block < end;) {
    const Segment s = segment_at(block, end);
    for (u32 k = s.first; k < s.last; k += PARTS, ring.next(STAGES)) {
      const u32 bytes = min((u32)PARTS, s.last - k) * 256, to = stage(ring.slot) + A_BYTES;
      barrier_wait(empty[ring.slot], ring.parity ^ 1);
      expect_bytes(full[ring.slot], num_rows * bytes, lane);
      copy_rows_by_warp(to, ROW_PITCH, source, k * 256, min(num_rows, 32), bytes, full[ring.slot], lane);
      if (TILE > 32 && num_rows > 32)
        copy_rows_by_warp(to + 32 * ROW_PITCH, ROW_PITCH, beyond, k * 256, num_rows - 32, bytes, full[ring.slot], lane);
      copies_arrive(full[ring.slot]);
    }
    block += s.last - s.first;
  }
}

// sum[s][j] += 16 outputs x steps 2 q and 2 q + 1 of a block, by rows 8 j .. 8 j + 7.
__device__ __forceinline__ void multiply_pair(float (&sum)[SUBS][N_TILES][4], int q, u32 weights, u32 rows) {
  uint4 v[SUBS];
#pragma unroll
  for (int s = 0; s < SUBS; ++s) v[s] = load_matrices((weights + s * 2048) ^ (q << 5));
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    u32 a[SUBS][4];
#pragma unroll
    for (int s = 0; s < SUBS; ++s) {
      widen_e4m3(a[s][0], a[s][2], step ? v[s].z : v[s].x);
      widen_e4m3(a[s][1], a[s][3], step ? v[s].w : v[s].y);
    }
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) {
      const uint2 x = load_shared_uint2(rows + j * 8 * ROW_PITCH + q * 64 + step * 32);
#pragma unroll
      for (int s = 0; s < SUBS; ++s) mma_bf16(sum[s][j], a[s], x.x, x.y);
    }
  }
}

__device__ __forceinline__ void add_scaled(float (&acc)[SUBS][N_TILES][4], const float (&sum)[SUBS][N_TILES][4],
                                           float scale) {
#pragma unroll
  for (int s = 0; s < SUBS; ++s)
#pragma unroll
    for (int j = 0; j < N_TILES; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[s][j][i] = __fmaf_rn(scale, sum[s][j][i], acc[s][j][i]);
}

// acc += scale x a block. Each half is one chain of products: few rows run the two side by side, many one after the
// other in fewer registers. The same additions in the same order.
__device__ __forceinline__ void multiply_block(float (&acc)[SUBS][N_TILES][4], u32 weights, u32 rows, float scale) {
  if constexpr (TILE <= 16) {
    float first[SUBS][N_TILES][4] = {}, second[SUBS][N_TILES][4] = {};
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      multiply_pair(first, q, weights, rows);
      multiply_pair(second, 2 + q, weights, rows);
    }
    add_scaled(acc, first, scale);
    add_scaled(acc, second, scale);
  } else {
#pragma unroll 1
    for (int half = 0; half < 4; half += 2) {
      float sum[SUBS][N_TILES][4] = {};
#pragma unroll
      for (int q = 0; q < 2; ++q) multiply_pair(sum, half + q, weights, rows);
      add_scaled(acc, sum, scale);
    }
  }
}

// This warp's blocks of a segment.
__device__ __forceinline__ void multiply(float (&acc)[SUBS][N_TILES][4], const Segment& s, const float* scales,
                                         int m_warp, int part, Ring& ring, int lane) {
#pragma unroll
  for (int i = 0; i < SUBS; ++i)
#pragma unroll
    for (int j = 0; j < N_TILES; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) acc[i][j][v] = 0.0f;
  const int r = lane & 7;  // lane l names row l & 15 of piece l / 16, of the first pair of pieces
  const u32 weights = part * BLOCK_BYTES + (m_warp * SUBS * 16 + (lane & 15)) * 128 + (((lane >> 4) ^ r) << 4);
  const u32 rows = A_BYTES + part * 256 + (lane >> 2) * ROW_PITCH + (lane & 3) * 8;
  scales += s.m * K_BLOCKS;
  float scale = __ldg(scales + min(s.first + part, K_BLOCKS - 1));
  for (u32 k = s.first; k < s.last; k += PARTS, ring.next(STAGES)) {
    const float next = __ldg(scales + min(k + PARTS + part, K_BLOCKS - 1));  // a turn ahead
    barrier_wait(full[ring.slot], ring.parity);
    if (k + part < s.last) multiply_block(acc, stage(ring.slot) + weights, stage(ring.slot) + rows, scale);
    __syncwarp();
    if (arrives(lane)) barrier_arrive(empty[ring.slot]);
    scale = next;
  }
}

// Part 0 gets the sums of both parts.
__device__ __forceinline__ void add_parts(float (&acc)[SUBS][N_TILES][4], int m_warp, int part, int lane) {
  float* theirs = exchange(m_warp) + lane;
#pragma unroll
  for (int s = 0; s < SUBS; ++s) {
    if (part)
#pragma unroll
      for (int i = 0; i < 4 * N_TILES; ++i) theirs[i * 32] = acc[s][i / 4][i % 4];
    named_barrier(1 + m_warp, PARTS * 32);
    if (!part)
#pragma unroll
      for (int i = 0; i < 4 * N_TILES; ++i) acc[s][i / 4][i % 4] += theirs[i * 32];
    named_barrier(1 + m_warp, PARTS * 32);  // the exchange may be written again
  }
}

// A CTA has two places for sums of tiles that it shares: of the one that it begins with, and of the one that it begins.
__device__ __forceinline__ float* place_of(float* partial, const Share& share, u32 cta, u32 m, int m_warp, int lane) {
  const u32 place = 2 * cta + (share.begin(cta) < m * K_BLOCKS);
  return partial + (i64)place * (128 * TILE) + m_warp * (SUBS * N_TILES * 4 * 32) + lane;
}

// Part 0's warps: leave the sums of a shared tile. True for the last one of those who share it, who gets them all.
__device__ __forceinline__ bool gather_shared(float (&acc)[SUBS][N_TILES][4], u32 m, const Share& share, float* partial,
                                              u32* counters, int m_warp, int lane) {
  const u32 first = share.owner(m * K_BLOCKS), last = share.owner((m + 1) * K_BLOCKS - 1);
  float* mine = place_of(partial, share, blockIdx.x, m, m_warp, lane);
#pragma unroll
  for (int i = 0; i < SUBS * N_TILES * 4; ++i) __stcg(mine + i * 32, acc[i / (N_TILES * 4)][i / 4 % N_TILES][i % 4]);
  named_barrier(LAST_BARRIER, M_WARPS * 32);
  if (m_warp == 0 && lane == 0) {
    is_last = add_acquire_release(counters + m, 1) == last - first;
    if (is_last) counters[m] = 0;  // for the next launch
  }
  named_barrier(LAST_BARRIER, M_WARPS * 32);
  if (!is_last) return false;
  for (u32 cta = first; cta <= last; ++cta) {
    const float* theirs = place_of(partial, share, cta, m, m_warp, lane);
#pragma unroll
    for (int i = 0; i < SUBS * N_TILES * 4; ++i) {
      float& sum = acc[i / (N_TILES * 4)][i / 4 % N_TILES][i % 4];
      const float v = __ldcg(theirs + i * 32);
      sum = cta == first ? v : sum + v;
    }
  }
  return true;
}

__device__ __forceinline__ void store(const float (&acc)[SUBS][N_TILES][4], u16* y, u32 m, int num_rows,
                                      int num_outputs, int m_warp, int lane) {
#pragma unroll
  for (int s = 0; s < SUBS; ++s)
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) {
      const u32 low = transpose_8x8(pack_bf16(acc[s][j][0], acc[s][j][1]));
      const u32 high = transpose_8x8(pack_bf16(acc[s][j][2], acc[s][j][3]));
      const int row = j * 8 + (lane >> 2);
      u16* to = y + (i64)row * num_outputs + m * 128 + (m_warp * SUBS + s) * 16 + (lane & 3) * 2;
      if (row < num_rows) *(u32*)to = low, *(u32*)(to + 8) = high;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dense_fp8(const u8* w, const float* scales, const u16* x, int num_rows, u16* y, int num_outputs, float* partial,
              u32* counters) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    if (stage(0) & 127) __trap();  // the swizzle is by address
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full[i], 2 * PRODUCER_ARRIVALS);
      barrier_init(empty[i], CONSUMERS * WARP_ARRIVALS);
    }
    barriers_visible();
  }
  __syncthreads();
  allow_next_kernel();
  const Share share = {(u32)num_outputs / 128 * K_BLOCKS};
  const u32 begin = share.begin(blockIdx.x), end = share.begin(blockIdx.x + 1);
  if (warp == CONSUMERS) return produce_weights(w, begin, end, lane);
  wait_for_previous_kernel();
  if (warp == CONSUMERS + 1) return produce_rows(x, num_rows, begin, end, lane);
  const int m_warp = warp % M_WARPS, part = warp / M_WARPS;
  Ring ring;
  for (u32 block = begin; block < end;) {
    const Segment s = segment_at(block, end);
    float acc[SUBS][N_TILES][4];
    multiply(acc, s, scales, m_warp, part, ring, lane);
    add_parts(acc, m_warp, part, lane);
    if (part == 0) {
      const bool whole = s.last - s.first == K_BLOCKS;
      if (whole || gather_shared(acc, s.m, share, partial, counters, m_warp, lane))
        store(acc, y, s.m, num_rows, num_outputs, m_warp, lane);
    }
    block += s.last - s.first;
  }
}
