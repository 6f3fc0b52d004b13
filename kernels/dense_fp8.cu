// dense_fp8.cu: y = x @ w^T for up to 16 rows: bf16 rows, e4m3 weights with a float32 scale for each 128x128 block,
// float32 sums, bf16 out (W8A16: exact to the checkpoint, rows are not quantised).  mma.sync m16n8k16, sm_80+. Reading
// w is all the work: each CTA takes an equal share of the outputs, in eights, over all of K, so nothing is left to
//   add up between CTAs. Its rows of a block (pack.py) lie together in memory.
// Smem: ring of STAGES x (PARTS k-blocks of OUTPUTS rows of w, the same columns of x). The first slots are filled with
//   weights before the kernel before this one has ended.
// Warps: one brings weights, one rows.  Of the others warp (m, part) multiplies 16 outputs by every PARTS-th k-block.
//   Weights are the wide operand; a piece of 16 bytes, 16 columns of an output, is one step of k: lane t of four has
//   columns 4 t to 4 t + 3, of weights by ldmatrix and of rows by one load of 8 bytes.
// A row's bits depend on that row and w alone.  Needs: K % (128 * PARTS) == 0, num_outputs % 128 == 0.
#include "e4m3.cuh"
#include "ring.cuh"

#ifndef K
#define K 4096
#define TILE 8
#define OUTPUTS 72
#define PARTS 4
#define STAGES 4
#endif

constexpr int K_BLOCKS = K / 128, TURNS = K_BLOCKS / PARTS;
constexpr int M_WARPS = (OUTPUTS + 15) / 16, CONSUMERS = PARTS * M_WARPS, THREADS = (CONSUMERS + 2) * 32;
constexpr int N_TILES = TILE / 8;
constexpr int SLICE_BYTES = OUTPUTS * 128;   // of a k-block; 16 outputs may reach into what follows, and are not stored
constexpr int ROW_PITCH = PARTS * 256 + 32;  // loads of 8 bytes by half a warp: four rows, no bank twice
constexpr int A_BYTES = PARTS * SLICE_BYTES, STAGE_BYTES = A_BYTES + TILE * ROW_PITCH;
static_assert(K % (128 * PARTS) == 0 && OUTPUTS % 8 == 0 && (TILE == 8 || TILE == 16), "dense_fp8.cu: sizes");
static_assert(TILE * ROW_PITCH >= 1024, "the last 8 outputs of 16 are somewhere");
static_assert((PARTS - 1) * M_WARPS * 64 * TILE <= STAGES * STAGE_BYTES, "the ring holds the parts' sums");

extern __shared__ __align__(1024) u8 ring_memory[];
__shared__ u64 full[STAGES], empty[STAGES];

__device__ __forceinline__ u32 stage(int slot) { return shared_address(ring_memory) + slot * STAGE_BYTES; }

// Outputs [first, first + count) of a CTA: eights.
struct Slice {
  int first, count;
};
__device__ __forceinline__ Slice slice_of(u32 cta, int num_outputs) {
  const u32 eights = num_outputs / 8, begin = cta * eights / gridDim.x, end = (cta + 1) * eights / gridDim.x;
  return {(int)begin * 8, (int)(end - begin) * 8};
}

// One warp. Reads nothing that the kernel before wrote. A slice may lie in two rows of blocks.
__device__ __forceinline__ void produce_weights(const u8* w, const Slice& slice, int lane) {
  const int row = slice.first % 128, here = min(slice.count, 128 - row), beyond = slice.count - here;
  const u8* from = w + (i64)(slice.first / 128) * K_BLOCKS * 16384;
  Ring ring;
  for (int turn = 0; turn < TURNS; ++turn, ring.next(STAGES)) {
    barrier_wait(empty[ring.slot], ring.parity ^ 1);
    expect_bytes(full[ring.slot], PARTS * slice.count * 128, lane);
    for (int p = 0; p < PARTS; ++p, from += 16384) {
      const u32 to = stage(ring.slot) + p * SLICE_BYTES;
      copy_by_warp<true>(to, from + row * 128, here * 128, full[ring.slot], lane);
      if (beyond) copy_by_warp<true>(to + here * 128, from + K_BLOCKS * 16384, beyond * 128, full[ring.slot], lane);
    }
    copies_arrive(full[ring.slot]);
  }
}

// One warp. Rows from num_rows on stay whatever was in memory: a column of a product sees its own row alone.
__device__ __forceinline__ void produce_rows(const u16* x, int num_rows, int lane) {
  const u16* source = x + (i64)min(lane, num_rows - 1) * K;
  Ring ring;
  for (int turn = 0; turn < TURNS; ++turn, ring.next(STAGES)) {
    barrier_wait(empty[ring.slot], ring.parity ^ 1);
    expect_bytes(full[ring.slot], num_rows * PARTS * 256, lane);
    copy_rows_by_warp(stage(ring.slot) + A_BYTES, ROW_PITCH, source, turn * PARTS * 256, num_rows, PARTS * 256,
                      full[ring.slot], lane);
    copies_arrive(full[ring.slot]);
  }
}

// sum[j] += 16 outputs x steps 2 q and 2 q + 1 of a block, by rows 8 j .. 8 j + 7.
__device__ __forceinline__ void multiply_pair(float (&sum)[N_TILES][4], int q, u32 weights, u32 rows) {
  const uint4 v = load_matrices(weights ^ (q << 5));
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    u32 a[4];
    widen_e4m3(a[0], a[2], step ? v.z : v.x);
    widen_e4m3(a[1], a[3], step ? v.w : v.y);
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) {
      const uint2 x = load_shared_uint2(rows + j * 8 * ROW_PITCH + q * 64 + step * 32);
      mma_bf16(sum[j], a, x.x, x.y);
    }
  }
}

__device__ __forceinline__ void add_scaled(float (&acc)[N_TILES][4], const float (&sum)[N_TILES][4], float low,
                                           float high) {
#pragma unroll
  for (int j = 0; j < N_TILES; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[j][i] = __fmaf_rn(i < 2 ? low : high, sum[j][i], acc[j][i]);
}

// acc = this warp's k-blocks: two chains of products a block run side by side.
__device__ __forceinline__ void multiply(float (&acc)[N_TILES][4], const Slice& slice, const float* scales, int m_warp,
                                         int part, int lane) {
#pragma unroll
  for (int j = 0; j < N_TILES; ++j)
#pragma unroll
    for (int v = 0; v < 4; ++v) acc[j][v] = 0.0f;
  // Lane l names row l & 15 of piece l / 16, of the first pair of pieces.
  const u32 weights = part * SLICE_BYTES + (m_warp * 16 + (lane & 15)) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
  const u32 rows = A_BYTES + part * 256 + (lane >> 2) * ROW_PITCH + (lane & 3) * 8;
  const int output = slice.first + m_warp * 16, last = slice.first + slice.count - 8;  // its eight have one scale each
  const float* low_scales = scales + min(output, last) / 128 * K_BLOCKS + part;
  const float* high_scales = scales + min(output + 8, last) / 128 * K_BLOCKS + part;
  float next_low = __ldg(low_scales), next_high = __ldg(high_scales);
  Ring ring;
#pragma unroll 1
  for (int turn = 0; turn < TURNS; ++turn, ring.next(STAGES)) {
    const float low = next_low, high = next_high;
    const int ahead = min(turn + 1, TURNS - 1) * PARTS;
    next_low = __ldg(low_scales + ahead), next_high = __ldg(high_scales + ahead);
    barrier_wait(full[ring.slot], ring.parity);
    float first[N_TILES][4] = {}, second[N_TILES][4] = {};
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      multiply_pair(first, q, stage(ring.slot) + weights, stage(ring.slot) + rows);
      multiply_pair(second, 2 + q, stage(ring.slot) + weights, stage(ring.slot) + rows);
    }
    __syncwarp();
    if (arrives(lane)) barrier_arrive(empty[ring.slot]);
    add_scaled(acc, first, low, high);
    add_scaled(acc, second, low, high);
  }
}

// Part 0 gets the sums of all parts, in order. The ring is used up.
__device__ __forceinline__ void add_parts(float (&acc)[N_TILES][4], int m_warp, int part, int lane) {
  float* theirs = (float*)ring_memory + m_warp * (PARTS - 1) * 16 * TILE + lane;
  named_barrier(1, CONSUMERS * 32);
  if (part)
#pragma unroll
    for (int i = 0; i < 4 * N_TILES; ++i) theirs[((part - 1) * 4 * N_TILES + i) * 32] = acc[i / 4][i % 4];
  named_barrier(1, CONSUMERS * 32);
  if (part) return;
#pragma unroll
  for (int p = 0; p < PARTS - 1; ++p)
#pragma unroll
    for (int i = 0; i < 4 * N_TILES; ++i) acc[i / 4][i % 4] += theirs[(p * 4 * N_TILES + i) * 32];
}

__device__ __forceinline__ void store(const float (&acc)[N_TILES][4], u16* y, const Slice& slice, int num_rows,
                                      int num_outputs, int m_warp, int lane) {
#pragma unroll
  for (int j = 0; j < N_TILES; ++j) {
    const u32 low = transpose_8x8(pack_bf16(acc[j][0], acc[j][1]));
    const u32 high = transpose_8x8(pack_bf16(acc[j][2], acc[j][3]));
    const int row = j * 8 + (lane >> 2), output = m_warp * 16;
    u16* to = y + (i64)row * num_outputs + slice.first + output + (lane & 3) * 2;
    if (row < num_rows && output < slice.count) *(u32*)to = low;
    if (row < num_rows && output + 8 < slice.count) *(u32*)(to + 8) = high;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dense_fp8(const u8* w, const float* scales, const u16* x, int num_rows, u16* y, int num_outputs) {
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
  const Slice slice = slice_of(blockIdx.x, num_outputs);
  if (warp == CONSUMERS) return produce_weights(w, slice, lane);
  wait_for_previous_kernel();
  if (warp == CONSUMERS + 1) return produce_rows(x, num_rows, lane);
  const int m_warp = warp % M_WARPS, part = warp / M_WARPS;
  float acc[N_TILES][4];
  multiply(acc, slice, scales, m_warp, part, lane);
  add_parts(acc, m_warp, part, lane);
  if (part == 0) store(acc, y, slice, num_rows, num_outputs, m_warp, lane);
}
