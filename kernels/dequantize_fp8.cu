// dequantize_fp8.cu: w [N, K] bf16 = bf16(e4m3 * scale) from blocks of 128x128 as pack.py lays them out.
// Grid: one CTA a block; a thread widens pieces of 16 columns.  Needs: K % 128 == 0.
#include "e4m3.cuh"

#ifndef K
#define K 4096
#endif
constexpr int THREADS = 256;

__device__ __forceinline__ u32 scaled(u32 pair, float scale) {
  return pack_bf16(__fmul_rn(bf16_low(pair), scale), __fmul_rn(bf16_high(pair), scale));
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_fp8(const u8* w, const float* scales, u16* out) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const u32 block = blockIdx.x, m = block / (K / 128), kb = block % (K / 128);
  const float scale = __ldg(scales + block);
#pragma unroll
  for (int i = threadIdx.x; i < 1024; i += THREADS) {
    const int row = i / 8, piece = i % 8;
    const uint4 v = __ldg((const uint4*)(w + (i64)block * 16384 + row * 128 + ((piece ^ (row & 7)) << 4)));
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    u32 pairs[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) widen_e4m3(pairs[2 * j], pairs[2 * j + 1], words[j]);
    uint4* to = (uint4*)(out + (i64)(m * 128 + row) * K + kb * 128 + piece * 16);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      to[j] = make_uint4(scaled(pairs[4 * j], scale), scaled(pairs[4 * j + 1], scale), scaled(pairs[4 * j + 2], scale),
                         scaled(pairs[4 * j + 3], scale));
  }
}
