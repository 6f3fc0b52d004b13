// widen_kv.cu: pages of e4m3 numbers -> bf16, exactly: out_k[i] = k[pages[i]], out_v[i] = v[pages[i]].
// For a kernel that takes bf16 pages alone (paged_prefill.cu). Grid: (pages, 2), 256 threads; 16 numbers a thread and
// turn, so reads are 16 bytes and writes two times 16.  Needs: PAGE % 16 == 0, pages of both caches contiguous.
#include "common.cuh"

#ifndef PAGE
#define PAGE 8192
#endif
static_assert(PAGE % 16 == 0, "widen_kv.cu: PAGE");

// Two e4m3 at bits 0-7 and 16-23 -> a pair of bf16. The exponent field moves into bf16's, 120 too low; the product by
// 2^120 is exact and makes subnormals right as well.
__device__ __forceinline__ u32 widen_pair(u32 pair) {
  const u32 moved = (pair << 8 & 0x80008000u) | (pair << 4 & 0x07f007f0u);
  constexpr float shift = 1.329227995784916e36f;  // 2^120
  return pack_bf16(__fmul_rn(bf16_low(moved), shift), __fmul_rn(bf16_high(moved), shift));
}

__device__ __forceinline__ uint4 widen_8(u32 first, u32 second) {
  uint4 out;
  out.x = widen_pair(__byte_perm(first, 0, 0x4140)), out.y = widen_pair(__byte_perm(first, 0, 0x4342));
  out.z = widen_pair(__byte_perm(second, 0, 0x4140)), out.w = widen_pair(__byte_perm(second, 0, 0x4342));
  return out;
}

extern "C" __global__ void __launch_bounds__(256)
    widen_kv(const u8* k, const u8* v, const int* __restrict__ pages, u16* out_k, u16* out_v) {
  allow_next_kernel();
  const i64 page = pages[blockIdx.x];  // sent by a copy long before
  wait_for_previous_kernel();
  const u8* from = (blockIdx.y ? v : k) + page * PAGE;
  u16* to = (blockIdx.y ? out_v : out_k) + (i64)blockIdx.x * PAGE;
#pragma unroll 2
  for (int i = threadIdx.x * 16; i < PAGE; i += 256 * 16) {
    const uint4 words = __ldcs((const uint4*)(from + i));
    *(uint4*)(to + i) = widen_8(words.x, words.y);
    *(uint4*)(to + i + 8) = widen_8(words.z, words.w);
  }
}
