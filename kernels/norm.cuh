// norm.cuh: RMSNorm of one row by one CTA: a thread holds VECTORS pieces of 8 columns, THREADS pieces apart. Or by a
// cluster of ROW_CTAS CTAs, each a run of columns: the same bits.
#pragma once
#include "common.cuh"
#if ROW_CTAS > 1
#include "hopper.cuh"
#else
#undef ROW_CTAS
#define ROW_CTAS 1
#endif

#ifndef HIDDEN
#define HIDDEN 2048
#endif
#ifndef THREADS
#define THREADS 256
#endif

constexpr int VECTORS = (HIDDEN / 8 + THREADS * ROW_CTAS - 1) / (THREADS * ROW_CTAS);
constexpr int ROW_WARPS = THREADS / 32 * ROW_CTAS;
static_assert(ROW_CTAS == 1 || VECTORS == 1, "norm.cuh: a cluster's threads hold a piece each");
static_assert(HIDDEN % 8 == 0 && THREADS % 32 == 0 && THREADS <= 1024, "norm.cuh: HIDDEN or THREADS");

struct Piece {
  float v[8];
};

__device__ __forceinline__ int piece_column(int i) {
  const int thread = ROW_CTAS > 1 ? blockIdx.x % ROW_CTAS * THREADS + threadIdx.x : threadIdx.x;
  return (i * THREADS + thread) * 8;
}

__device__ __forceinline__ Piece unpack_piece(uint4 words) {
  return {{bf16_low(words.x), bf16_high(words.x), bf16_low(words.y), bf16_high(words.y), bf16_low(words.z),
           bf16_high(words.z), bf16_low(words.w), bf16_high(words.w)}};
}

__device__ __forceinline__ uint4 pack_piece(const Piece& p) {
  return make_uint4(pack_bf16(p.v[0], p.v[1]), pack_bf16(p.v[2], p.v[3]), pack_bf16(p.v[4], p.v[5]),
                    pack_bf16(p.v[6], p.v[7]));
}

// bf16(a + b)
__device__ __forceinline__ uint4 add_pieces(const Piece& a, const Piece& b) {
  Piece sum;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum.v[j] = __fadd_rn(a.v[j], b.v[j]);
  return pack_piece(sum);
}

// The norm's weight: constant, so it may be read before the kernel before this one has ended. Not `ld.global.nc`: the
// assembler would move such a load to its use.
__device__ __forceinline__ void load_weight(const u16* weight, uint4 (&out)[VECTORS]) {
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
    if (piece_column(i) < HIDDEN)
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(out[i].x), "=r"(out[i].y), "=r"(out[i].z), "=r"(out[i].w)
                   : "l"(weight + piece_column(i)));
}

// A row's sum of squares has the same bits in every thread and kernel, since its order is the same: within a thread
// (add_squares), across a warp (warp_sum), warp after warp.
__device__ __forceinline__ float add_squares(const Piece& x, float squares) {
#pragma unroll
  for (int j = 0; j < 8; ++j) squares = __fmaf_rn(x.v[j], x.v[j], squares);
  return squares;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

__device__ __forceinline__ float sum_of_warps(const float (&of_warp)[ROW_WARPS]) {
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < ROW_WARPS; ++w) total += of_warp[w];
  return total;
}

__shared__ float of_warp[ROW_WARPS];

#if ROW_CTAS == 1
__device__ __forceinline__ void begin_row() {}

__device__ __forceinline__ float row_sum(float v) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = v;
  __syncthreads();
  return sum_of_warps(of_warp);
}
#else
__shared__ u64 sums_arrived;

// Once, before row_sum: every CTA is there to be written to.
__device__ __forceinline__ void begin_row() {
  if (threadIdx.x == 0) {
    barrier_init(shared_address(&sums_arrived), 1);
    barriers_visible();
    barrier_arrive_expect(shared_address(&sums_arrived), sizeof of_warp);
  }
  __syncwarp();
  cluster_started();
}

// Each warp's sum goes to all CTAs.
__device__ __forceinline__ float row_sum(float v) {
  const int lane = threadIdx.x & 31, warp = blockIdx.x % ROW_CTAS * (THREADS / 32) + (threadIdx.x >> 5);
  v = warp_sum(v);
  if (lane < ROW_CTAS)
    store_cluster_async(in_cluster(shared_address(&of_warp[warp]), lane), v,
                        in_cluster(shared_address(&sums_arrived), lane));
  barrier_wait(shared_address(&sums_arrived), 0);
  return sum_of_warps(of_warp);
}
#endif

// 1 / rms of a row.
__device__ __forceinline__ float rms_scale(float squares, float eps) {
  return __frsqrt_rn(__fmaf_rn(squares, 1.0f / HIDDEN, eps));
}

// bf16(bf16(x * scale) * weight): transformers' order of rounding.
__device__ __forceinline__ uint4 norm_piece(const Piece& x, uint4 weight, float scale) {
  Piece y, w = unpack_piece(weight);
#pragma unroll
  for (int j = 0; j < 8; ++j) y.v[j] = __fmul_rn(x.v[j], scale);
  y = unpack_piece(pack_piece(y));
#pragma unroll
  for (int j = 0; j < 8; ++j) y.v[j] = __fmul_rn(y.v[j], w.v[j]);
  return pack_piece(y);
}

// out = the norm of the row. `x` holds values that bf16 holds exactly.
__device__ __forceinline__ void norm_and_store(const Piece (&x)[VECTORS], const uint4 (&weight)[VECTORS], float eps,
                                               u16* out) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
    if (piece_column(i) < HIDDEN) squares = add_squares(x[i], squares);
  const float scale = rms_scale(row_sum(squares), eps);
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
    if (piece_column(i) < HIDDEN) *(uint4*)(out + piece_column(i)) = norm_piece(x[i], weight[i], scale);
}
