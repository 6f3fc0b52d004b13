// norm.cuh: RMSNorm of one row by one CTA: a thread holds VECTORS pieces of 8 columns, THREADS pieces apart.
#pragma once
#include "common.cuh"

#ifndef HIDDEN
#define HIDDEN 2048
#endif
#ifndef THREADS
#define THREADS 256
#endif

constexpr int VECTORS = (HIDDEN / 8 + THREADS - 1) / THREADS;
static_assert(HIDDEN % 8 == 0 && THREADS % 32 == 0 && THREADS <= 1024, "norm.cuh: HIDDEN or THREADS");

struct Piece {
  float v[8];
};

__device__ __forceinline__ int piece_column(int i) { return (i * THREADS + (int)threadIdx.x) * 8; }

__device__ __forceinline__ Piece unpack_piece(uint4 words) {
  return {{bf16_low(words.x), bf16_high(words.x), bf16_low(words.y), bf16_high(words.y), bf16_low(words.z),
           bf16_high(words.z), bf16_low(words.w), bf16_high(words.w)}};
}

__device__ __forceinline__ uint4 pack_piece(const Piece& p) {
  return make_uint4(pack_bf16(p.v[0], p.v[1]), pack_bf16(p.v[2], p.v[3]), pack_bf16(p.v[4], p.v[5]),
                    pack_bf16(p.v[6], p.v[7]));
}

// The norm's weight: constant, so it may be read before the kernel before this one has ended.
__device__ __forceinline__ void load_weight(const u16* weight, uint4 (&out)[VECTORS]) {
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
    if (piece_column(i) < HIDDEN) out[i] = __ldg((const uint4*)(weight + piece_column(i)));
}

// The same bits in every thread, the same order for every row: within a thread, across a warp, warp after warp.
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float of_warp[THREADS / 32];
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = v;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) total += of_warp[w];
  return total;
}

// out = bf16(bf16(x / rms(x)) * weight): transformers' order of rounding. `x` holds values that bf16 holds exactly.
__device__ __forceinline__ void norm_and_store(const Piece (&x)[VECTORS], const uint4 (&weight)[VECTORS], float eps,
                                               u16* out) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
    if (piece_column(i) < HIDDEN)
#pragma unroll
      for (int j = 0; j < 8; ++j) squares = __fmaf_rn(x[i].v[j], x[i].v[j], squares);
  const float scale = __frsqrt_rn(__fmaf_rn(block_sum(squares), 1.0f / HIDDEN, eps));
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    if (piece_column(i) >= HIDDEN) continue;
    Piece y, w = unpack_piece(weight[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) y.v[j] = __fmul_rn(x[i].v[j], scale);
    y = unpack_piece(pack_piece(y));
#pragma unroll
    for (int j = 0; j < 8; ++j) y.v[j] = __fmul_rn(y.v[j], w.v[j]);
    *(uint4*)(out + piece_column(i)) = pack_piece(y);
  }
}
