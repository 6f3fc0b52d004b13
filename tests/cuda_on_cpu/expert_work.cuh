// expert_work.cuh: what permute_few.cu and permute_pairs.cu take from kernels/expert_work.cuh and of CUDA besides
// emulated.h: votes of a warp, and work that is noted at once.
#pragma once
#include "emulated.h"
#undef __shared__
#define __shared__ static

struct int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __popc(u32 bits) { return __builtin_popcount(bits); }
inline u32 __ballot_sync(u32 mask, bool mine) {
  u32 bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (u32)__shfl_sync(mask, (int)mine, i) << i;
  return bits;
}
inline u32 __match_any_sync(u32 mask, int mine) {
  u32 bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (u32)(__shfl_sync(mask, mine, i) == mine) << i;
  return bits;
}
inline int __reduce_add_sync(u32 mask, int mine) {
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += __shfl_sync(mask, mine, i);
  return sum;
}
template <class T>
T __shfl_up_sync(u32 mask, T v, int d) {
  return __shfl_sync(mask, v, lane() < d ? lane() : lane() - d);
}

inline float fp8_scale(float peak) { return peak == 0 ? 1 : peak / 448; }
struct Work {
  u64 num_products, num_pairs;
};
inline void begin_product(Work* work, Work&, u64&) {
  if (work) ++work->num_products;
}
inline void note_product(Work* work, const Work&, u64, int num_pairs) {
  if (work) work->num_pairs += num_pairs;
}
inline void count_rows(u64* rows, int count) { *rows += count; }
