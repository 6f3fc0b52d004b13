// permute.cpp: kernels/permute_few.cu, or permute_pairs.cu (PAIRS), as a library for ctypes.
#if defined(PAIRS)
#include "permute_pairs.cu"
#define KERNEL route_and_pack_pairs
#else
#include "permute_few.cu"
#define KERNEL route_and_pack
#endif

u8 ring_memory[16];

extern "C" void run(int num_ctas, int backwards, const int* ids, int num_pairs, const int* expert_map, int num_mapped,
                    int tile, int granule, const u16* x, i64 capacity, int* counts, int* pair_of_row, int4* tiles,
                    u32* ready, int* state, u8* packed, float* scales, Work* work, u64* expert_rows) {
  launch(
      num_ctas, THREADS, backwards, [] {},
      [=] {
        KERNEL(ids, num_pairs, expert_map, num_mapped, tile, granule, x, capacity, counts, pair_of_row, tiles, ready,
               state, packed, scales, work, expert_rows);
      });
}
