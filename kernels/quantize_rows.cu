// quantize_rows.cu: rows [T, K] bf16 -> e4m3 with a float32 scale for each row and 128 columns, laid out for wgmma:
// packed[K / 128][capacity][128 B], 16-byte pieces swizzled by row & 7; scales [K / 128][capacity].
// Grid: a warp takes 256 columns of a row, 8 a lane. Rows from T on are left as they are.  Needs: K % 128 == 0.
#include "common.cuh"

#ifndef K
#define K 4096
#endif
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
  const float scale = fp8_scale(peak), inverse = __frcp_rn(scale);  // infinite: the group becomes NaN
  u32 bytes[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    bytes[i] = pack_e4m3(f[4 * i] * inverse, f[4 * i + 1] * inverse) |
               (u32)pack_e4m3(f[4 * i + 2] * inverse, f[4 * i + 3] * inverse) << 16;
  const u32 piece = lane % 16 / 2;
  *(uint2*)(packed + (block * capacity + row) * 128 + ((piece ^ (row & 7)) << 4) + (lane & 1) * 8) =
      make_uint2(bytes[0], bytes[1]);
  if (lane % 16 == 0) scales[block * capacity + row] = scale;
}
