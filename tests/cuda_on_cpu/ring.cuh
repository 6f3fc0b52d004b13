// ring.cuh: what stands for kernels/ring.cuh on a CPU.
#pragma once
#include "emulated.h"

#define CP_ASYNC 0
constexpr u32 PRODUCER_ARRIVALS = 1;

struct Ring {
  int slot = 0;
  u32 parity = 0;
  void next(int size) {
    if (++slot == size) slot = 0, parity ^= 1;
  }
};
inline void barriers_visible() {}
inline void barrier_init(u64& b, u32 count) { init_at(shared_address(&b), count); }
inline void barrier_arrive(u64& b) { arrive_at(shared_address(&b)); }
inline void barrier_wait(u64& b, u32 parity) { wait_at(shared_address(&b), parity); }
inline void copies_arrive(u64&) {}
inline void expect_bytes(u64& b, u32 bytes, int lane) {
  if (lane == 0) expect_at(shared_address(&b), bytes);
  __syncwarp();
}
template <bool ONCE>
void copy_by_warp(u32 to, const u8* from, u32 bytes, u64& b, int lane) {
  if (lane == 0) copy_at(to, from, bytes, shared_address(&b));
}
inline void copy_rows_by_warp(u32 to, u32 pitch, const u16* from, u32 offset, int num_rows, u32 bytes, u64& b,
                              int lane) {
  if (lane < num_rows) copy_at(to + lane * pitch, (const u8*)from + offset, bytes, shared_address(&b));
}

inline uint2 load_shared_uint2(u32 address) {
  if (address & 7) broken("misaligned load");
  return at_shared<uint2>(address);
}
inline uint4 load_matrices(u32 address) {
  if (address & 15) broken("misaligned row of a matrix");
  shown()[lane()][0] = address;
  warp_meets();
  u32 v[4];
  for (int m = 0; m < 4; ++m) v[m] = at_shared<u32>(shown()[8 * m + (lane() >> 2)][0] + 4 * (lane() & 3));
  warp_meets();
  return {v[0], v[1], v[2], v[3]};
}
inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  auto& s = shown();
  const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int i = 0; i < 6; ++i) s[lane()][i] = mine[i];
  warp_meets();
  auto half = [](u32 pair, int k) { return (double)(k & 1 ? bf16_high(pair) : bf16_low(pair)); };
  const int g = lane() >> 2, t = lane() & 3;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i >> 1), column = 2 * t + (i & 1);
    double sum = d[i];
    for (int k = 0; k < 16; ++k)
      sum += half(s[4 * (row & 7) + (k & 7) / 2][(row >= 8) + 2 * (k >= 8)], k) *
             half(s[4 * column + (k & 7) / 2][4 + (k >= 8)], k);
    d[i] = (float)sum;
  }
  warp_meets();
}
