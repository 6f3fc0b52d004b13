// dense_w8a8_few.cu: y = x @ w^T for up to 128 rows, e4m3 both sides: rows with a scale for each 128 columns
// (quantize_rows.cu, as many rows as there are, rounded up to 8), weights with one for each 128x128 block; float32
// across blocks, bf16 out.  sm_90a: wgmma m64nNk32, outputs are M. Reading w is most of the work: each CTA takes an
// equal share of the outputs, in eights, over all of K, so nothing is left
//   to add up between CTAs. Its rows of a block (pack.py) lie together in memory.
// Smem: ring of STAGES x (PARTS k-blocks of OUTPUTS rows of w, the same columns of x, their scales). The first slots
// are
//   filled with weights before the kernel before this one has ended.
// Warps: one thread brings weights, one rows.  Warpgroup (m, part) multiplies 64 outputs by every PARTS-th k-block.
// A row's bits depend on that row and w alone.  Needs: K % (128 * PARTS) == 0, num_outputs % 128 == 0.
#include "hopper.cuh"

#ifndef K
#define K 4096
#define TILE 64
#define OUTPUTS 72
#define PARTS 1
#define STAGES 4
#endif

constexpr int K_BLOCKS = K / 128, TURNS = K_BLOCKS / PARTS;
constexpr int M_GROUPS = (OUTPUTS + 63) / 64, CONSUMERS = M_GROUPS * PARTS * 128, THREADS = CONSUMERS + 128;
constexpr int SLICE_BYTES = OUTPUTS * 128;  // of a k-block; 64 outputs may reach into what follows, and are not stored
constexpr int A_BYTES = PARTS * SLICE_BYTES, B_BYTES = PARTS * TILE * 128, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int SCALE_BYTES = PARTS * TILE * 4, BEYOND_BYTES = 8192;  // the last slot's 64 outputs end there
static_assert(K % (128 * PARTS) == 0 && OUTPUTS % 8 == 0 && OUTPUTS <= 128 && TILE % 8 == 0,
              "dense_w8a8_few.cu: sizes");
static_assert((PARTS - 1) * M_GROUPS * 256 * TILE <= STAGES * STAGE_BYTES, "the ring holds the parts' sums");

extern __shared__ __align__(1024) u8 ring_memory[];
__shared__ u64 full[STAGES], empty[STAGES];

__device__ __forceinline__ u32 at(const u64& barrier) { return shared_address(&barrier); }

struct Ring {  // position in a ring; the parity flips at each turn
  int slot = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ u32 weights() const { return shared_address(ring_memory) + slot * STAGE_BYTES; }
  __device__ __forceinline__ u32 rows() const { return weights() + A_BYTES; }
  __device__ __forceinline__ u32 scales() const {
    return shared_address(ring_memory) + STAGES * STAGE_BYTES + BEYOND_BYTES + slot * SCALE_BYTES;
  }
};

// Outputs [first, first + count) of a CTA: eights.
struct Slice {
  int first, count;
};
__device__ __forceinline__ Slice slice_of(u32 cta, int num_outputs) {
  const u32 eights = num_outputs / 8, begin = cta * eights / gridDim.x, end = (cta + 1) * eights / gridDim.x;
  return {(int)begin * 8, (int)(end - begin) * 8};
}

// One thread. Reads nothing that the kernel before wrote. A slice may lie in two rows of blocks.
__device__ __forceinline__ void produce_weights(const u8* w, const Slice& slice) {
  const int row = slice.first % 128, here = min(slice.count, 128 - row), beyond = slice.count - here;
  const u8* from = w + (i64)(slice.first / 128) * K_BLOCKS * 16384 + row * 128;
  const u8* next = w + (i64)(slice.first / 128 + 1) * K_BLOCKS * 16384;
  Ring ring;
#pragma unroll 1
  for (int turn = 0; turn < TURNS; ++turn, ring.next()) {
    const u32 barrier = at(full[ring.slot]);
    barrier_wait(at(empty[ring.slot]), ring.parity ^ 1);
    barrier_arrive_expect(barrier, PARTS * slice.count * 128);
#pragma unroll
    for (int p = 0; p < PARTS; ++p, from += 16384, next += 16384) {
      bulk_load(ring.weights() + p * SLICE_BYTES, from, here * 128, barrier);
      if (beyond) bulk_load(ring.weights() + p * SLICE_BYTES + here * 128, next, beyond * 128, barrier);
    }
  }
}

// One thread. `rows`: of a k-block of x.
__device__ __forceinline__ void produce_rows(const u8* x, const float* x_scales, int rows) {
  Ring ring;
#pragma unroll 1
  for (int turn = 0; turn < TURNS; ++turn, ring.next()) {
    const u32 barrier = at(full[ring.slot]);
    barrier_wait(at(empty[ring.slot]), ring.parity ^ 1);
    barrier_arrive_expect(barrier, PARTS * rows * 132);
    bulk_load(ring.rows(), x, PARTS * rows * 128, barrier);
    bulk_load(ring.scales(), x_scales, PARTS * rows * 4, barrier);
    x += PARTS * rows * 128, x_scales += PARTS * rows;
  }
}

// acc = this warpgroup's k-blocks; of a thread: outputs `low` and low + 8 of the slice, rows 8 j + 2 t and the next.
template <int N>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Slice& slice, const float* scales, int m, int part,
                                         int rows, int lane) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
  const int warp = (threadIdx.x >> 5) & 3, last = slice.first + slice.count - 8;  // an eight has one scale
  const int output = slice.first + m * 64 + warp * 16;
  const float* low_scales = scales + min(output, last) / 128 * K_BLOCKS + part;
  const float* high_scales = scales + min(output + 8, last) / 128 * K_BLOCKS + part;
  float next_low = __ldg(low_scales), next_high = __ldg(high_scales);
  Ring ring;
#pragma unroll 1
  for (int turn = 0; turn < TURNS; ++turn, ring.next()) {
    const float low = next_low, high = next_high;
    const int ahead = min(turn + 1, TURNS - 1) * PARTS;
    next_low = __ldg(low_scales + ahead), next_high = __ldg(high_scales + ahead);
    barrier_wait(at(full[ring.slot]), ring.parity);
    const u64 a = operand_descriptor(ring.weights() + part * SLICE_BYTES + m * 8192);
    const u64 b = operand_descriptor(ring.rows() + part * rows * 128);
    const u32 row_scales = ring.scales() + part * rows * 4 + (lane & 3) * 8;
    float product[N / 2];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) Wgmma<N>::e4m3(product, a + 2 * step, b + 2 * step, step);
    wgmma_commit();
    wgmma_wait<0>();
    pin_registers(product);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 row_scale = load_shared_pair(row_scales + j * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        acc[4 * j + i] =
            __fmaf_rn(product[4 * j + i], (i & 1 ? row_scale.y : row_scale.x) * (i & 2 ? high : low), acc[4 * j + i]);
    }
    __syncwarp();
    if (arrives(lane)) barrier_arrive(at(empty[ring.slot]));
  }
}

// Part 0 gets the sums of all parts, in order. The ring is used up.
template <int N>
__device__ __forceinline__ void add_parts(float (&acc)[N / 2], int m, int part) {
  if constexpr (PARTS == 1) return;
  float* theirs = (float*)ring_memory + m * (PARTS - 1) * 64 * N + (threadIdx.x & 127);
  named_barrier(1, CONSUMERS);
  if (part)
#pragma unroll
    for (int i = 0; i < N / 2; ++i) theirs[((part - 1) * (N / 2) + i) * 128] = acc[i];
  named_barrier(1, CONSUMERS);
  if (part) return;
#pragma unroll
  for (int p = 0; p < PARTS - 1; ++p)
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] += theirs[(p * (N / 2) + i) * 128];
}

template <int N>
__device__ __forceinline__ void store(const float (&acc)[N / 2], u16* y, const Slice& slice, int m, int num_rows,
                                      int num_outputs, int lane) {
  const int output = m * 64 + ((threadIdx.x >> 5) & 3) * 16;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const u32 low = transpose_8x8(pack_bf16(acc[4 * j], acc[4 * j + 1]));
    const u32 high = transpose_8x8(pack_bf16(acc[4 * j + 2], acc[4 * j + 3]));
    const int row = j * 8 + (lane >> 2);
    u16* to = y + (i64)row * num_outputs + slice.first + output + (lane & 3) * 2;
    if (row < num_rows && output < slice.count) *(u32*)to = low;
    if (row < num_rows && output + 8 < slice.count) *(u32*)(to + 8) = high;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dense_w8a8_few(const u8* w, const float* scales, const u8* x, const float* x_scales, int num_rows, u16* y,
                   int num_outputs) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(at(full[i]), 2);
      barrier_init(at(empty[i]), CONSUMERS / 32 * WARP_ARRIVALS);
    }
    barriers_visible();
  }
  __syncthreads();
  allow_next_kernel();
  const Slice slice = slice_of(blockIdx.x, num_outputs);
  const int rows = round_up_8(num_rows);
  if (warp < 4) {
    if (threadIdx.x == 0) produce_weights(w, slice);
    if (threadIdx.x == 32) {
      wait_for_previous_kernel();
      produce_rows(x, x_scales, rows);
    }
    __syncwarp();
  } else {
    wait_for_previous_kernel();
    const int group = (warp >> 2) - 1, m = group % M_GROUPS, part = group / M_GROUPS;
    float acc[TILE / 2];
    multiply<TILE>(acc, slice, scales, m, part, rows, lane);
    add_parts<TILE>(acc, m, part);
    if (part == 0) store<TILE>(acc, y, slice, m, num_rows, num_outputs, lane);
  }
}
