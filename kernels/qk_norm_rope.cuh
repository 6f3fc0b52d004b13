// qk_norm_rope.cuh: one head of q or k, normed and rotated: n = bf16(bf16(x / rms(x)) * weight of the head), then
// n * cos + rolled n * sin rounded to bf16. Float32 inside, in the order of the plain model. A head is LANES lanes of a
// warp with 8 columns each; the other half of a pair is a shuffle away, so all lanes of the warp take part. KV_FP8: the
// cache holds e4m3 numbers, rounded from the bf16 ones, without a scale.
#pragma once
#include "common.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef KV_FP8
#define KV_FP8 0
#endif

#if KV_FP8
using Kv = u8;
#else
using Kv = u16;
#endif

constexpr int LANES = HEAD_DIM / 8, HALF = HEAD_DIM / 2;
static_assert(LANES >= 2 && LANES <= 32 && (LANES & (LANES - 1)) == 0, "qk_norm_rope.cuh: HEAD_DIM");

__device__ __forceinline__ void unpack_8(uint4 words, float (&v)[8]) {
  const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) v[2 * j] = bf16_low(word[j]), v[2 * j + 1] = bf16_high(word[j]);
}

__device__ __forceinline__ uint4 pack_8(const float (&v)[8]) {
  return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// Eight numbers of a head to where the cache has them.
__device__ __forceinline__ void store_kv(Kv* to, uint4 words) {
#if KV_FP8
  float v[8];
  unpack_8(words, v);
  *(uint2*)to = make_uint2((u32)pack_e4m3(v[0], v[1]) | (u32)pack_e4m3(v[2], v[3]) << 16,
                           (u32)pack_e4m3(v[4], v[5]) | (u32)pack_e4m3(v[6], v[7]) << 16);
#else
  *(uint4*)to = words;
#endif
}

// A position's part of the rotation, for the columns of one lane; sin is negative for the first half.
struct Turn {
  float cosine[8], sine[8];

  __device__ __forceinline__ void load(const float* cos_sin, i64 position, int lane) {
    const float sign = lane < LANES / 2 ? -1.0f : 1.0f;
    const float* table = cos_sin + position * HEAD_DIM + lane % (LANES / 2) * 8;
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const float4 c = *(const float4*)(table + j), s = *(const float4*)(table + HALF + j);
      cosine[j] = c.x, cosine[j + 1] = c.y, cosine[j + 2] = c.z, cosine[j + 3] = c.w;
      sine[j] = sign * s.x, sine[j + 1] = sign * s.y, sine[j + 2] = sign * s.z, sine[j + 3] = sign * s.w;
    }
  }
};

__device__ __forceinline__ uint4 norm_and_turn(uint4 raw, uint4 weight, float eps, const Turn& turn) {
  float v[8];
  unpack_8(raw, v);
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) squares = __fmaf_rn(v[j], v[j], squares);
#pragma unroll
  for (int d = LANES / 2; d; d >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, d);
  const float scale = __frsqrt_rn(__fmaf_rn(squares, 1.0f / HEAD_DIM, eps));
  float w[8], n[8], other[8];
  unpack_8(weight, w);
#pragma unroll
  for (int j = 0; j < 8; ++j) n[j] = __fmul_rn(v[j], scale);
  unpack_8(pack_8(n), n);
#pragma unroll
  for (int j = 0; j < 8; ++j) n[j] = __fmul_rn(n[j], w[j]);
  uint4 mine = pack_8(n), theirs;
  theirs.x = __shfl_xor_sync(0xffffffffu, mine.x, LANES / 2);
  theirs.y = __shfl_xor_sync(0xffffffffu, mine.y, LANES / 2);
  theirs.z = __shfl_xor_sync(0xffffffffu, mine.z, LANES / 2);
  theirs.w = __shfl_xor_sync(0xffffffffu, mine.w, LANES / 2);
  unpack_8(mine, n);
  unpack_8(theirs, other);
#pragma unroll
  for (int j = 0; j < 8; ++j) n[j] = __fadd_rn(__fmul_rn(n[j], turn.cosine[j]), __fmul_rn(other[j], turn.sine[j]));
  return pack_8(n);
}
