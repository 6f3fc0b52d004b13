// e4m3.cuh: e4m3 numbers widened to bf16, exactly.
#pragma once
#include "ring.cuh"

// The four numbers of a word -> two pairs, in the order of their bytes. Sign and magnitude move to their places in
// bf16, where the exponent is 120 too low; the product by 2^120 is exact and makes subnormals right as well.
__device__ __forceinline__ void widen_e4m3(u32& first, u32& second, u32 word) {
  const u32 low = __byte_perm(word, 0, 0x1404), high = __byte_perm(word, 0, 0x3424);  // a byte on top of each half
  first = scale_bf16x2((low & 0x80008000u) | ((low >> 4) & 0x07f007f0u), 0x7b807b80u);
  second = scale_bf16x2((high & 0x80008000u) | ((high >> 4) & 0x07f007f0u), 0x7b807b80u);
}
