// quantize_rows.cu: rows [T, K] bf16 -> e4m3 with a float32 scale for each row and 128 columns, laid out for wgmma:
// packed[K / 128][capacity][128 B], 16-byte pieces swizzled by row & 7; scales [K / 128][capacity].
// SPLIT: a row becomes two, whose sum it is: the number rounded to e4m3 and what is left, e4m3 too. The scale is a
// power
//   of two then, so that nothing else is rounded: 8 bits of bf16 are 4 and 4, exactly from 2^-9 of the group's largest
//   on.
// Grid: a warp takes 256 columns of a row, 8 a lane. Rows from T on are left as they are.  Needs: K % 128 == 0.
#include "common.cuh"

#ifndef K
#define K 4096
#endif
#ifndef SPLIT
#define SPLIT 0
#endif
// Exact: the exponent of float32 is 120 larger.
__device__ __forceinline__ float from_e4m3(u32 byte) {
  return __uint_as_float((byte & 0x80u) << 24 | (byte & 0x7fu) << 20) * __uint_as_float(247u << 23);
}

constexpr u32 SPANS = (K + 255) / 256;

extern "C" __global__ void __launch_bounds__(256)
    quantize_rows(const u16* x, int num_rows, i64 capacity, u8* packed, float* scales) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const u32 item = blockIdx.x * 8 + (threadIdx.x >> 5), row = item / SPANS, lane = threadIdx.x & 31;
  if (row >= (u32)num_rows) return;
  const u32 column = item % SPANS * 256 + lane * 8, block = column / 128;
  const bool inside = column < K;
  uint4 v = make_uint4(0, 0, 0, 0);
  if (inside) v = *(const uint4*)(x + (i64)row * K + column);
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  float f[8], peak = 0.0f;
  bool bad = false;  // fmaxf passes over NaN
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    f[i] = i & 1 ? bf16_high(words[i / 2]) : bf16_low(words[i / 2]);
    peak = fmaxf(peak, fabsf(f[i]));
    bad |= f[i] != f[i];
  }
  if (bad) peak = __int_as_float(0x7f800000);
#pragma unroll
  for (int d = 1; d < 16; d <<= 1) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, d));  // of 16 lanes
  if (!inside) return;
  float scale = fp8_scale(peak);
  if (SPLIT) scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);
  const float inverse = __frcp_rn(scale);  // 0 of an infinite one: the group becomes NaN
#pragma unroll
  for (int i = 0; i < 8; ++i) f[i] *= inverse;
#pragma unroll
  for (int half = 0; half <= SPLIT; ++half) {
    u32 bytes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      bytes[i] = pack_e4m3(f[4 * i], f[4 * i + 1]) | (u32)pack_e4m3(f[4 * i + 2], f[4 * i + 3]) << 16;
    const u32 piece = lane % 16 / 2, to = row * (SPLIT + 1) + half;
    *(uint2*)(packed + (block * capacity + to) * 128 + ((piece ^ (to & 7)) << 4) + (lane & 1) * 8) =
        make_uint2(bytes[0], bytes[1]);
    if (lane % 16 == 0) scales[block * capacity + to] = scale;
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] -= from_e4m3(bytes[i / 4] >> 8 * (i % 4) & 0xff);
  }
}
