// sample.cuh: what the sampler's kernels share: a slot's state, logits as ordered keys, the counter-based uniform.
#pragma once
#include "common.cuh"

#ifndef LOGITS_F32
#define LOGITS_F32 0
#endif
#ifndef ALIGNED  // rows and their stride are whole 16-byte units
#define ALIGNED 1
#endif

constexpr int MAX_CLOSING = 104;
constexpr int BLOCK_IDS = 256;  // ids that one warp looks at together: 8 a lane

// One slot, 512 bytes; kernels/sample.py has the same fields. What a token changes is changed on the device alone.
struct Slot {
  double temperature, top_p, min_p;
  u64 seed, position;  // position: output tokens so far
  i64 last_token;      // staged by the host; later in its own tensor
  int slot, top_k;
  int has_thinking, think_id, end_think_id, budget, inside, num_spent, cursor, num_closing;
  int closing[MAX_CLOSING];
  int unused[2];
};
static_assert(sizeof(Slot) == 512, "kernels/sample.py lays slots out in 512 bytes");

// Larger is better; NaN is best of all, as numpy's arg max has it; -0 equals 0. No number has key 0: an absent id.
__device__ __forceinline__ u32 key_of(float x) {
  const u32 bits = __float_as_uint(__fadd_rn(x, 0.0f));
  if (x != x) return 0xffffffffu;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(u32 key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
constexpr u32 LOWEST_KEY = 0x007fffffu;  // of -inf
__device__ __forceinline__ bool finite_key(u32 key) { return key > LOWEST_KEY && key < 0xff800000u; }

// The order of everything here: logit, then the lower id.
__device__ __forceinline__ u64 rank_of(u32 key, int id) { return (u64)key << 32 | (u32)~id; }
__device__ __forceinline__ int id_of(u64 rank) { return (int)~(u32)rank; }
__device__ __forceinline__ u32 key_of_rank(u64 rank) { return (u32)(rank >> 32); }

// 8 logits from `first` on; -> how many of them are ids.
__device__ __forceinline__ int load_8(const void* row, int first, int vocab_size, float (&v)[8]) {
  const int count = min(8, vocab_size - first);
#if LOGITS_F32
  const float* from = (const float*)row + first;
  if (ALIGNED && count == 8) {
    const float4 a = *(const float4*)from, b = *(const float4*)(from + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return 8;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = j < count ? from[j] : 0.0f;
#else
  const u16* from = (const u16*)row + first;
  if (ALIGNED && count == 8) {
    const uint4 words = *(const uint4*)from;
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) v[2 * j] = bf16_low(word[j]), v[2 * j + 1] = bf16_high(word[j]);
    return 8;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = j < count ? __uint_as_float((u32)from[j] << 16) : 0.0f;
#endif
  return count;
}

__device__ __forceinline__ float load_1(const void* row, int id) {
  return LOGITS_F32 ? ((const float*)row)[id] : __uint_as_float((u32)((const u16*)row)[id] << 16);
}

__device__ __forceinline__ const void* row_of(const void* logits, i64 row, i64 stride) {
  return (const char*)logits + row * stride * (LOGITS_F32 ? 4 : 2);
}

__device__ __forceinline__ u64 warp_max(u64 v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    const u64 other = __shfl_xor_sync(0xffffffffu, v, d);
    v = other > v ? other : v;
  }
  return v;
}
__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

// Philox4x32-10 of (seed, position) -> [0, 1), 53 bits; cluster/attention/draw.py's.
__device__ __forceinline__ double uniform_of(u64 seed, u64 position) {
  u32 key0 = (u32)seed, key1 = (u32)(seed >> 32), c0 = (u32)position, c1 = (u32)(position >> 32), c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 product0 = (u64)c0 * 0xD2511F53u, product1 = (u64)c2 * 0xCD9E8D57u;
    c0 = (u32)(product1 >> 32) ^ c1 ^ key0;
    c1 = (u32)product1;
    c2 = (u32)(product0 >> 32) ^ c3 ^ key1;
    c3 = (u32)product0;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return ((c0 >> 5) * 67108864.0 + (c1 >> 6)) / 9007199254740992.0;
}
