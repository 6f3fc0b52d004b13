// hopper.cuh: what stands for kernels/hopper.cuh on a CPU. A product reads its operands when it is issued.
#pragma once
#include "emulated.h"

inline void barriers_visible() {}
inline void barrier_init(u32 address, u32 count) { init_at(address, count); }
inline void barrier_arrive(u32 address) { arrive_at(address); }
inline void barrier_arrive_expect(u32 address, u32 bytes) { expect_at(address, bytes); }
inline void barrier_wait(u32 address, u32 parity) { wait_at(address, parity); }
inline void bulk_load(u32 to, const void* from, u32 bytes, u32 address) { copy_at(to, from, bytes, address); }
inline float2 load_shared_pair(u32 address) { return at_shared<float2>(address); }
inline float load_shared_float(u32 address) { return at_shared<float>(address); }

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int PENDING>
void wgmma_wait() {}
template <int COUNT>
void pin_registers(float (&)[COUNT]) {}
template <int COUNT>
void registers_down() {}
template <int COUNT>
void registers_up() {}

inline u64 operand_descriptor(u32 address) { return address >> 4; }
template <int N>
struct Wgmma {
  static void e4m3(float (&d)[N / 2], u64 a, u64 b, int add) {
    const u32 a_at = (u32)a << 4, b_at = (u32)b << 4;
    if ((a_at | b_at) & 1023 & ~127) broken("an operand's 8 rows do not begin at a multiple of 1024");
    auto element = [](u32 base, int row, int k) {
      const int byte = (base & 127) + k;
      return (double)from_e4m3(
          at_shared<u8>((base & ~127u) + row * 128 + (((byte >> 4) ^ (row & 7)) << 4 | (byte & 15))));
    };
    for (int i = 0; i < N / 2; ++i) {
      const int row = (threadIdx.x >> 5 & 3) * 16 + (lane() >> 2) + 8 * (i >> 1 & 1);
      const int column = (i >> 2) * 8 + 2 * (lane() & 3) + (i & 1);
      double sum = add ? d[i] : 0;
      for (int k = 0; k < 32; ++k) sum += element(a_at, row, k) * element(b_at, column, k);
      d[i] = (float)sum;
    }
  }
};
