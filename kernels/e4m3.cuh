// e4m3.cuh: e4m3 numbers widened to bf16, exactly.
#pragma once
#include "common.cuh"

// The upper bytes of both halves of a word. Sign and magnitude move to their places in bf16, where the exponent is 120
// too low; the product by 2^120 is exact and makes subnormals right as well.
__device__ __forceinline__ u32 widen_upper_e4m3(u32 word) {
  return scale_bf16x2((word & 0x80008000u) | ((word >> 4) & 0x07f007f0u), 0x7b807b80u);
}

// The four numbers of a word -> two pairs, in the order of their bytes.
__device__ __forceinline__ void widen_e4m3(u32& first, u32& second, u32 word) {
  first = widen_upper_e4m3(__byte_perm(word, 0, 0x1404));  // a byte on top of each half
  second = widen_upper_e4m3(__byte_perm(word, 0, 0x3424));
}
