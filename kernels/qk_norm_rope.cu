// qk_norm_rope.cu: q and k heads: n = bf16(bf16(x / rms(x)) * weight of the head), then n * cos + rolled n * sin
// rounded to bf16; q to its own tensor, k and v to the slot of the paged cache. Float32 inside, in the order of the
// plain model. A head is HEAD_DIM / 8 lanes of 8 columns; the other half of a pair is a shuffle away. Grid: (tokens,
// spans of heads), 128 threads; PER_GROUP heads a group of lanes, so that prefill reads a position's cos and sin once
// for several heads. KV_FP8: the cache holds e4m3 numbers, rounded from the bf16 ones, without a scale.
// Needs: HEAD_DIM of 16, 32, 64, 128 or 256.
#include "common.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef NUM_HEADS
#define NUM_HEADS 32
#endif
#ifndef NUM_KV_HEADS
#define NUM_KV_HEADS 4
#endif
#ifndef PER_GROUP
#define PER_GROUP 1
#endif
#ifndef KV_FP8
#define KV_FP8 0
#endif

#if KV_FP8
using Kv = u8;
#else
using Kv = u16;
#endif

constexpr int LANES = HEAD_DIM / 8, GROUPS = 128 / LANES, HALF = HEAD_DIM / 2;
constexpr int NORMED = NUM_HEADS + NUM_KV_HEADS, ALL = NORMED + NUM_KV_HEADS;
static_assert(LANES >= 2 && LANES <= 32 && (LANES & (LANES - 1)) == 0, "qk_norm_rope.cu: HEAD_DIM");

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

extern "C" __global__ void __launch_bounds__(128)
    qk_norm_rope(const u16* qkv, const u16* __restrict__ qk_norm, float eps, const float* cos_sin, const i64* positions,
                 const i64* slot_mapping, Kv* k_cache, Kv* v_cache, u16* q) {
  allow_next_kernel();
  const int lane = threadIdx.x % LANES;
  const int first_head = blockIdx.y * (GROUPS * PER_GROUP) + threadIdx.x / LANES;
  uint4 weight[PER_GROUP];  // constant: before the kernel that makes qkv has ended
#pragma unroll
  for (int i = 0; i < PER_GROUP; ++i) {
    const int head = first_head + i * GROUPS;
    if (head < NORMED) weight[i] = __ldg((const uint4*)(qk_norm + head * HEAD_DIM + lane * 8));
  }
  wait_for_previous_kernel();
  const i64 token = blockIdx.x;
  const i64 position = positions[token], slot = slot_mapping[token];
  uint4 raw[PER_GROUP];
#pragma unroll
  for (int i = 0; i < PER_GROUP; ++i) {
    const int head = first_head + i * GROUPS;
    raw[i] = make_uint4(0, 0, 0, 0);
    if (head < ALL) raw[i] = __ldcs((const uint4*)(qkv + (token * ALL + head) * HEAD_DIM + lane * 8));
  }
  float cosine[8], sine[8];  // of columns lane * 8 .. + 8; sin is negative for the first half
  const float sign = lane < LANES / 2 ? -1.0f : 1.0f;
  const float* table = cos_sin + position * HEAD_DIM + lane % (LANES / 2) * 8;
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const float4 c = *(const float4*)(table + j), s = *(const float4*)(table + HALF + j);
    cosine[j] = c.x, cosine[j + 1] = c.y, cosine[j + 2] = c.z, cosine[j + 3] = c.w;
    sine[j] = sign * s.x, sine[j + 1] = sign * s.y, sine[j + 2] = sign * s.z, sine[j + 3] = sign * s.w;
  }
#pragma unroll
  for (int i = 0; i < PER_GROUP; ++i) {
    const int head = first_head + i * GROUPS;
    float v[8];
    unpack_8(raw[i], v);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = __fmaf_rn(v[j], v[j], squares);
#pragma unroll
    for (int d = LANES / 2; d; d >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, d);
    const float scale = __frsqrt_rn(__fmaf_rn(squares, 1.0f / HEAD_DIM, eps));
    float w[8], n[8], other[8];
    unpack_8(head < NORMED ? weight[i] : make_uint4(0, 0, 0, 0), w);
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
    for (int j = 0; j < 8; ++j) n[j] = __fadd_rn(__fmul_rn(n[j], cosine[j]), __fmul_rn(other[j], sine[j]));
    const uint4 turned = pack_8(n);
    if (head < NUM_HEADS) {
      *(uint4*)(q + (token * NUM_HEADS + head) * HEAD_DIM + lane * 8) = turned;
    } else if (head < ALL && slot >= 0) {
      const bool is_key = head < NORMED;
      const int kv_head = head - (is_key ? NUM_HEADS : NORMED);
      Kv* cache = is_key ? k_cache : v_cache;
      store_kv(cache + (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM + lane * 8, is_key ? turned : raw[i]);
    }
  }
}
