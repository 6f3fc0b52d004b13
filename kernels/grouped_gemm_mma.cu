// grouped_gemm_mma.cu: y[r, k] = w2[e] @ (silu(w1[e] @ x[r]) * (w3[e] @ x[r])), e = the local expert of pair (r, k);
// bf16 rows, weights bf16, e4m3 with 128x128 block scales (W8A16), or int4 in groups of 128; mma.sync m16n8k16, sm_80+.
// The weights are the wide operand (M), an expert's rows are N: N is cut to multiples of 8 that the tile holds.
// Weights lie in memory in the order of the instruction's registers (pack_mma.py): a lane's 16 bytes are its fragments
//   of 1 (bf16), 2 (e4m3) or 4 (int4) steps of 16 columns, widened to bf16 in registers.  Values are exact there (e4m3
//   and q - zero are short integers times a power of two); a group's sum is scaled in float32.
// One launch, persistent: CTAs claim tiles in order, first all of w13, then all of w2, whose weights stream in while
//   the rows' w13 is still being finished; a w2 tile waits for the counter of its rows.  A CTA's first tile is its own
//   index, w13 tiles wait for nothing: no deadlock while the whole grid can be resident (plans see to that; two
//   launches at once on two streams could not both be).
// Smem: ring of STAGES x (M_ROWS outputs x PARTS units of columns, TILE rows of the same columns at a pitch without
// bank
//   conflicts), then the exchange.  Rows come straight from x (gathered by pair) and from h: no permuted copy.
//   sm_90 and later: bulk copies; before: cp.async.
// Warps: one brings weights, one rows; of the others, warp (m, part) multiplies 16 outputs by the units u % PARTS ==
//   part of the columns.  Four sums (units u % 4) are kept apart and added at the end, by 2 warps or by 4: every output
//   has one order of additions whatever the plan, and a row depends neither on the others nor on the plan.
// Needs: HIDDEN % 128 == 0; INTERMEDIATE % 128 == 0 (bf16: % 64), M_ROWS divides both heights; TILE <= 32.
#include "expert_work.cuh"
#include "ring.cuh"

#ifndef HIDDEN
#define HIDDEN 4096
#define INTERMEDIATE 1536
#define M_ROWS 128
#define TILE 16
#define STAGES 4
#define FORM 2
#endif
#ifndef TOP_K
#define TOP_K 8
#endif
#ifndef ZEROS  // int4: the weights have zero points of their own
#define ZEROS 0
#endif
#ifndef SCALES_BF16
#define SCALES_BF16 0
#endif
#ifndef PARTS  // of the columns, each with warps of its own
#define PARTS 2
#endif
#ifndef CTAS  // on one multiprocessor
#define CTAS 1
#endif

constexpr int BF16 = 0, W8A16 = 1, INT4 = 2;
constexpr int UNIT_K = FORM == BF16 ? 64 : 128;  // columns of a unit: a group, a block, or 128 bytes
constexpr int VECTORS = FORM == INT4 ? 2 : 4;    // of 16 bytes, a lane's part of 16 outputs x a unit
constexpr int PAIRS = UNIT_K / 32;               // of steps of 16 columns in a unit
constexpr int SUB_BYTES = VECTORS * 512;         // 16 outputs x a unit
constexpr int SCALE_BYTES = FORM == INT4 ? 32 : FORM == W8A16 ? 8 : 0;   // of 16 outputs
constexpr int UNIT_BYTES = 4 * (SUB_BYTES + SCALE_BYTES * (1 + ZEROS));  // of a panel of 64 outputs
constexpr int PANELS = M_ROWS / 64, M_WARPS = M_ROWS / 16;
constexpr int CONSUMERS = PARTS * M_WARPS, THREADS = (CONSUMERS + 2) * 32;
constexpr int ROW_BYTES = 2 * PARTS * UNIT_K, ROW_PITCH = ROW_BYTES + 16;  // a unit of bf16 for each part
constexpr int A_BYTES = PANELS * PARTS * UNIT_BYTES, B_BYTES = TILE * ROW_PITCH, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int UNITS_1 = HIDDEN / UNIT_K, UNITS_2 = INTERMEDIATE / UNIT_K;
constexpr int M_TILES_1 = 2 * INTERMEDIATE / M_ROWS, M_TILES_2 = HIDDEN / M_ROWS;
constexpr int CHAINS = 4 / PARTS;  // sums of a warp: unit u of the columns belongs to sum u % 4
constexpr int QUEUE = 4;
static_assert(TILE % 8 == 0 && TILE <= 32, "a lane names a row");
static_assert(STAGE_BYTES % 16 == 0 && UNIT_BYTES % 16 == 0, "copies are of 16 bytes");

struct Tile {  // what a CTA does next; expert < 0: nothing
  int expert, entry, first_row, num_rows, m_tile, second;
};

extern __shared__ __align__(128) u8 ring_memory[];
__shared__ u64 full[STAGES], empty[STAGES], queue_full[QUEUE], queue_empty[QUEUE];
__shared__ Tile queue[QUEUE];

__device__ __forceinline__ u32 stage(int slot) { return shared_address(ring_memory) + slot * STAGE_BYTES; }
__device__ __forceinline__ float* exchange(int m_warp) {
  return (float*)(ring_memory + STAGES * STAGE_BYTES) + m_warp * (PARTS - 1) * CHAINS * 16 * TILE;
}
__device__ __forceinline__ int units_of(const Tile& tile) { return tile.second ? UNITS_2 : UNITS_1; }

__device__ __forceinline__ Tile next_tile(Ring& q) {
  barrier_wait(queue_full[q.slot], q.parity);
  const Tile seen = queue[q.slot];
  auto one = [](int v) { return __shfl_sync(0xffffffffu, v, 0); };
  const Tile tile = {one(seen.expert),   one(seen.entry),  one(seen.first_row),
                     one(seen.num_rows), one(seen.m_tile), one(seen.second)};
  __syncwarp();
  if (arrives(threadIdx.x & 31)) barrier_arrive(queue_empty[q.slot]);
  q.next(QUEUE);
  return tile;
}

// Tell every warp which tile is number `t`.
__device__ __forceinline__ Tile announce(Ring& q, u32 t, u32 num_entries, const int4* tiles, const int4& first_rows,
                                         int lane) {
  Tile tile = {-1, 0, 0, 0, 0, 0};
  if (t < num_entries * (M_TILES_1 + M_TILES_2)) {
    tile.second = t >= num_entries * M_TILES_1;
    const u32 rest = tile.second ? t - num_entries * M_TILES_1 : t;
    tile.entry = rest / (tile.second ? M_TILES_2 : M_TILES_1);
    tile.m_tile = rest % (tile.second ? M_TILES_2 : M_TILES_1);
    const int4 rows = t == blockIdx.x && !tile.second ? first_rows : __ldg(tiles + tile.entry);
    tile.expert = rows.x, tile.first_row = rows.y, tile.num_rows = rows.z;
  }
  if (lane == 0) {
    barrier_wait(queue_empty[q.slot], q.parity ^ 1);
    queue[q.slot] = tile;
    barrier_arrive(queue_full[q.slot]);
  }
  __syncwarp();
  q.next(QUEUE);
  return tile;
}

// One warp: claims tiles and streams weights.
__device__ __forceinline__ void produce_weights(const u8* w13, const u8* w2, const int4* tiles, int max_tiles,
                                                int* state, int lane) {
  u32 t = blockIdx.x;  // the first claim is the CTA's own index, and its rows are read before it is known to exist
  const int4 first_rows = __ldg(tiles + min(t / M_TILES_1, max_tiles - 1));
  const u32 num_entries = __ldg(state);
  Ring ring, q;
  while (true) {
    const Tile tile = announce(q, t, num_entries, tiles, first_rows, lane);
    if (tile.expert < 0) return;
    if (lane == 0) t = gridDim.x + atomicAdd((u32*)state + 3, 1);
    const int units = units_of(tile);
    const i64 height = tile.second ? HIDDEN / 64 : 2 * INTERMEDIATE / 64;
    const u8* source = (tile.second ? w2 : w13) + (tile.expert * height + tile.m_tile * PANELS) * units * UNIT_BYTES;
    for (int u = 0; u < units; u += PARTS, ring.next(STAGES)) {
      const u32 bytes = min(PARTS, units - u) * UNIT_BYTES;
      barrier_wait(empty[ring.slot], ring.parity ^ 1);
      expect_bytes(full[ring.slot], PANELS * bytes, lane);
#pragma unroll
      for (int p = 0; p < PANELS; ++p)
        copy_by_warp<(TILE <= 16)>(stage(ring.slot) + p * PARTS * UNIT_BYTES,
                                   source + ((i64)p * units + u) * UNIT_BYTES, bytes, full[ring.slot], lane);
      copies_arrive(full[ring.slot]);
    }
    t = __shfl_sync(0xffffffffu, t, 0);
  }
}

// One warp: streams each tile's rows: rows of x by pair for w13, the SwiGLU rows for w2 once they are complete.
__device__ __forceinline__ void produce_rows(const u16* x, const u16* h, const int* pair_of_row, const u32* ready,
                                             int lane) {
  Ring ring, q;
  while (true) {
    const Tile tile = next_tile(q);
    if (tile.expert < 0) return;
    const int row = min(lane, tile.num_rows - 1);
    const u16* source = tile.second ? h + (i64)(tile.first_row + row) * INTERMEDIATE
                                    : x + (i64)(__ldg(pair_of_row + tile.first_row + row) / TOP_K) * HIDDEN;
    if (tile.second) {
      u32 tries = 0;
      while (load_acquire(ready + tile.entry) < M_TILES_1 * M_WARPS) give_up_after(tries, 32);
      order_copies_after();
    }
    const int units = units_of(tile);
    for (int u = 0; u < units; u += PARTS, ring.next(STAGES)) {
      const u32 bytes = min(PARTS, units - u) * UNIT_K * 2;
      barrier_wait(empty[ring.slot], ring.parity ^ 1);
      expect_bytes(full[ring.slot], tile.num_rows * bytes, lane);
      copy_rows_by_warp(stage(ring.slot) + A_BYTES, ROW_PITCH, source, u * UNIT_K * 2, tile.num_rows, bytes,
                        full[ring.slot], lane);
      copies_arrive(full[ring.slot]);
    }
  }
}

// ------------------------------------------------------------------------------------------------- widening to bf16
// Eight nibbles -> the four registers of one step: register r is nibbles r and r + 4.  0x4300 | q is 128 + q in bf16.
__device__ __forceinline__ void widen_int4(u32 (&a)[4], u32 word, u32 low_point, u32 high_point) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
    a[r] = add_bf16x2(((word >> (4 * r)) & 0x000f000fu) | 0x43004300u, r & 1 ? high_point : low_point);
}

// Eight e4m3 -> four registers.  The exponent field moves into bf16's, 120 too low; the product by 2^120 is exact and
// makes subnormals right as well.
__device__ __forceinline__ void widen_e4m3(u32 (&a)[4], u32 first, u32 second) {
  const u32 word[2] = {first, second};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 w = word[i];
    a[2 * i] = scale_bf16x2(((w << 8) & 0x80008000u) | ((w << 4) & 0x07f007f0u), 0x7b807b80u);
    a[2 * i + 1] = scale_bf16x2((w & 0x80008000u) | ((w >> 4) & 0x07f007f0u), 0x7b807b80u);
  }
}

__device__ __forceinline__ float widen_scale(u32 bits) {
#if SCALES_BF16
  return __uint_as_float(bits << 16);
#else
  return half_to_float((u16)bits);
#endif
}

// ------------------------------------------------------------------------------------------------------------ products
// sum[j] += 16 outputs x steps 2 p and 2 p + 1 of a unit, by rows 8 j .. 8 j + 7.
template <int N>
__device__ __forceinline__ void multiply_pair(float (&sum)[N / 8][4], int p, u32 weights, u32 rows, u32 low_point,
                                              u32 high_point) {
  u32 a[4], b[4];
  if constexpr (FORM == INT4) {
    const uint2 v = load_shared_uint2(weights + p / 2 * 512 + p % 2 * 8);
    widen_int4(a, v.x, low_point, high_point);
    widen_int4(b, v.y, low_point, high_point);
  } else if constexpr (FORM == W8A16) {
    const uint4 v = load_shared_uint4(weights + p * 512);
    widen_e4m3(a, v.x, v.y);
    widen_e4m3(b, v.z, v.w);
  } else {
    const uint4 v = load_shared_uint4(weights + p * 1024), w = load_shared_uint4(weights + p * 1024 + 512);
    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
    b[0] = w.x, b[1] = w.y, b[2] = w.z, b[3] = w.w;
  }
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const uint4 x = load_matrices(rows + j * 8 * ROW_PITCH + p * 64);
    mma_bf16(sum[j], a, x.x, x.y);
    mma_bf16(sum[j], b, x.z, x.w);
  }
}

template <int N>
__device__ __forceinline__ void add_scaled(float (&acc)[N / 8][4], const float (&sum)[N / 8][4], float low,
                                           float high) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    acc[j][0] = __fmaf_rn(low, sum[j][0], acc[j][0]);
    acc[j][1] = __fmaf_rn(low, sum[j][1], acc[j][1]);
    acc[j][2] = __fmaf_rn(high, sum[j][2], acc[j][2]);
    acc[j][3] = __fmaf_rn(high, sum[j][3], acc[j][3]);
  }
}

// acc += 16 outputs x a unit.  Each half of the unit is one chain of products, scaled by itself: few rows run the two
// side by side, many one after the other in fewer registers.  The same additions in the same order.
template <int N>
__device__ __forceinline__ void multiply_unit(float (&acc)[N / 8][4], u32 weights, u32 scales, u32 rows, int lane) {
  float low = 1.0f, high = 1.0f;
  u32 low_point = 0xc308c308u, high_point = 0xc308c308u;  // -136 = -(128 + 8), twice
  if constexpr (FORM == INT4) {
    const u32 both = load_shared_u32(scales + (lane >> 2) * 4);
    low = widen_scale(both & 0xffff), high = widen_scale(both >> 16);
    if constexpr (ZEROS) {
      const u32 points = load_shared_u32(scales + 4 * SCALE_BYTES + (lane >> 2) * 4);
      low_point = (points & 0xffffu) * 0x10001u, high_point = (points >> 16) * 0x10001u;
    }
  } else if constexpr (FORM == W8A16) {
    low = load_shared_float(scales), high = load_shared_float(scales + 4);
  }
  if constexpr (N <= 16) {
    float first[N / 8][4] = {}, second[N / 8][4] = {};
#pragma unroll
    for (int p = 0; p < PAIRS / 2; ++p) {
      multiply_pair<N>(first, p, weights, rows, low_point, high_point);
      multiply_pair<N>(second, p + PAIRS / 2, weights, rows, low_point, high_point);
    }
    add_scaled<N>(acc, first, low, high);
    add_scaled<N>(acc, second, low, high);
  } else {
#pragma unroll 1
    for (int half = 0; half < PAIRS; half += PAIRS / 2) {
      float sum[N / 8][4] = {};
#pragma unroll
      for (int p = 0; p < PAIRS / 2; ++p) multiply_pair<N>(sum, half + p, weights, rows, low_point, high_point);
      add_scaled<N>(acc, sum, low, high);
    }
  }
}

// A tile's product: units part, part + PARTS, ... by this warp, unit u to sum u % 4: CHAINS sums of its own.
template <int N>
__device__ __forceinline__ void multiply(float (&acc)[CHAINS][N / 8][4], const Tile& tile, int m_warp, int part,
                                         Ring& ring, int lane) {
#pragma unroll
  for (int c = 0; c < CHAINS; ++c)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[c][j][i] = 0.0f;
  const int units = units_of(tile), sub = m_warp % 4;
  const u32 unit = (m_warp / 4 * PARTS + part) * UNIT_BYTES;
  const u32 row = (lane & 7) * ROW_PITCH + (lane >> 3) * 16;  // matrix i of an ldmatrix: columns 8 i .. 8 i + 7
  for (int u = 0; u < units; u += 4) {
#pragma unroll
    for (int c = 0; c < CHAINS; ++c) {
      if (u + c * PARTS >= units) break;
      const u32 block = stage(ring.slot) + unit, rows = stage(ring.slot) + A_BYTES + part * UNIT_K * 2 + row;
      barrier_wait(full[ring.slot], ring.parity);
      if (u + c * PARTS + part < units)
        multiply_unit<N>(acc[c], block + sub * SUB_BYTES + lane * 16, block + 4 * SUB_BYTES + sub * SCALE_BYTES, rows,
                         lane);
      __syncwarp();
      if (arrives(lane)) barrier_arrive(empty[ring.slot]);
      ring.next(STAGES);
    }
  }
}

struct Outputs {
  u16* h;  // [padded row][INTERMEDIATE]
  u16* y;  // [pair][HIDDEN]
  const int* pair_of_row;
  u32* ready;
};

// The four sums added in their order, whoever held them.
template <int N>
__device__ __forceinline__ void add_parts(float (&acc)[CHAINS][N / 8][4], int m_warp, int part, int lane) {
  float* theirs = exchange(m_warp) + lane;  // [part - 1][chain][N / 2][lane]
  if (part > 0)
#pragma unroll
    for (int c = 0; c < CHAINS; ++c)
#pragma unroll
      for (int i = 0; i < N / 2; ++i) theirs[(((part - 1) * CHAINS + c) * N / 2 + i) * 32] = acc[c][i / 4][i % 4];
  named_barrier(1 + m_warp, PARTS * 32);
  if (part == 0)
#pragma unroll
    for (int s = 1; s < 4; ++s)
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        acc[0][i / 4][i % 4] += s % PARTS ? theirs[((s % PARTS - 1) * CHAINS + s / PARTS) * N / 2 * 32 + i * 32]
                                          : acc[s / PARTS % CHAINS][i / 4][i % 4];
  named_barrier(1 + m_warp, PARTS * 32);  // the exchange may be written again
}

// SwiGLU rows to h, or rows of y to their pairs' places.  A warp's piece of a row is 16 (w13: 8 outputs) or 32 bytes.
template <int N>
__device__ __forceinline__ void store(const float (&acc)[N / 8][4], const Tile& tile, int m_warp, const Outputs& out,
                                      int lane) {
  const int row_in_group = lane >> 2, column = (lane & 3) * 2;
  if (!tile.second) {
    u16* base = out.h + (i64)tile.first_row * INTERMEDIATE + tile.m_tile * (M_ROWS / 2) + m_warp * 8 + column;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const u32 pair = pack_bf16(silu(acc[j][0]) * acc[j][2], silu(acc[j][1]) * acc[j][3]);
      const u32 turned = transpose_8x8(pair);
      const int row = j * 8 + row_in_group;
      if (row < tile.num_rows) *(u32*)(base + (i64)row * INTERMEDIATE) = turned;
    }
    order_before_copies();
    __syncwarp();
    if (lane == 0) add_release(out.ready + tile.entry, 1);
  } else {
    u16* base = out.y + tile.m_tile * M_ROWS + m_warp * 16 + column;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const int row = j * 8 + row_in_group;
      const int pair = row < tile.num_rows ? __ldg(out.pair_of_row + tile.first_row + row) : -1;
      const u32 low = transpose_8x8(pack_bf16(acc[j][0], acc[j][1]));
      const u32 high = transpose_8x8(pack_bf16(acc[j][2], acc[j][3]));
      if (pair >= 0) {
        *(u32*)(base + (i64)pair * HIDDEN) = low;
        *(u32*)(base + (i64)pair * HIDDEN + 8) = high;
      }
    }
  }
}

template <int N>
__device__ __forceinline__ void run_tile(const Tile& tile, int m_warp, int part, Ring& ring, const Outputs& out,
                                         int lane) {
  float acc[CHAINS][N / 8][4];
  multiply<N>(acc, tile, m_warp, part, ring, lane);
  add_parts<N>(acc, m_warp, part, lane);
  if (part == 0) store<N>(acc[0], tile, m_warp, out, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
    grouped_gemm_mma(const u8* w13, const u8* w2, const u16* x, u16* h, u16* y, const int* pair_of_row,
                     const int4* tiles, int max_tiles, u32* ready, int* state, Work* work) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full[i], 2 * PRODUCER_ARRIVALS);
      barrier_init(empty[i], CONSUMERS * WARP_ARRIVALS);
    }
    for (int i = 0; i < QUEUE; ++i) {
      barrier_init(queue_full[i], 1);
      barrier_init(queue_empty[i], (CONSUMERS + 1) * WARP_ARRIVALS);
    }
    barriers_visible();
  }
  __syncthreads();
  allow_next_kernel();
  wait_for_previous_kernel();

  if (warp == CONSUMERS) return produce_weights(w13, w2, tiles, max_tiles, state, lane);
  if (warp == CONSUMERS + 1) return produce_rows(x, h, pair_of_row, ready, lane);
  const Outputs out = {h, y, pair_of_row, ready};
  const int m_warp = warp % M_WARPS, part = warp / M_WARPS;
  Ring ring, q;
  while (true) {
    const Tile tile = next_tile(q);
    if (tile.expert < 0) break;
    const int n = tile.num_rows;
#define COVER(N)                                        \
  if constexpr (N <= TILE)                              \
    if (n <= N) {                                       \
      run_tile<N>(tile, m_warp, part, ring, out, lane); \
      continue;                                         \
    }
    COVER(8) COVER(16) COVER(32)
#undef COVER
  }
  if (warp == 0 && lane == 0) end_product(work);
}
