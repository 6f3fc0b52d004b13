// permute_pairs.cu: route and pack of permute.cu for at most 64 pairs, a CTA for each: the same places, tiles and
// blocks. A pair's row of x does not depend on where it goes, so it is asked for together with the ids; where it goes
// every warp finds by itself, from a vote of its lanes, each of which holds two pairs. No scan over experts, and at
// most one barrier. What the products read is written by those who know it: a pair's place by its CTA, an expert's
// tiles and padding by the CTA of its first pair, counts and totals by CTA 0.
// Needs: 1 to 64 pairs, NUM_EXPERTS <= 256 local experts; HIDDEN % 64 == 0 (FP8: % 128); `tile` == TILE.
#ifndef NUM_EXPERTS
#define NUM_EXPERTS 128
#endif
#ifndef HIDDEN
#define HIDDEN 4096
#endif
#ifndef TOP_K
#define TOP_K 8
#endif
#ifndef FP8
#define FP8 0
#endif
#ifndef TILE
#define TILE 8
#endif
#include "places.cuh"

constexpr int PIECES = HIDDEN / 8, WARPS = PIECES < 256 ? (PIECES + 31) / 32 : 8, THREADS = WARPS * 32;
constexpr int EACH = (PIECES + THREADS - 1) / THREADS;
static_assert(NUM_EXPERTS <= 256 && TILE % 8 == 0, "permute_pairs.cu: NUM_EXPERTS or TILE");
constexpr int MAPPED = 512;  // entries of the expert map that come into shared memory, while the ids come

struct Pairs {    // of a lane: pairs `lane` and 32 + `lane`
  int expert[2];  // -1 not local
  int rank[2];    // how many pairs of the expert stand before it
};

// Local expert of an id; `map` is the expert map's beginning.
__device__ __forceinline__ int mapped_expert(int id, const int* map, const int* expert_map, int num_mapped) {
  if (!expert_map || (u32)id >= MAPPED) return local_expert(id, expert_map, num_mapped);
  return local_expert(id < num_mapped ? map[id] : -1, nullptr, 0);
}

// Of the experts below `below_expert`: how many runs of at most SIZE rows theirs are.
template <int SIZE>
__device__ __forceinline__ int num_runs(const Pairs& pairs, int below_expert) {
  int votes = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    votes += __popc(__ballot_sync(0xffffffffu,
                                  pairs.expert[h] >= 0 && pairs.expert[h] < below_expert && pairs.rank[h] % SIZE == 0));
  return votes;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    route_and_pack_pairs(const int* ids, int num_pairs, const int* expert_map, int num_mapped, int /* tile */,
                         int granule, const u16* x, i64 capacity, int* counts, int* pair_of_row, int4* tiles,
                         u32* ready, int* state, u8* packed, float* scales, Work* work, u64* expert_rows) {
  __shared__ int map[MAPPED];
  __shared__ u8 counted[WARPS][NUM_EXPERTS];  // pairs of each expert; every warp has its own
  __shared__ Work kept;
  __shared__ u64 began;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, pair = blockIdx.x;
  u8* mine = counted[warp];
#pragma unroll 1
  for (int e = lane; e < NUM_EXPERTS; e += 32) mine[e] = 0;
  __syncwarp();
  allow_next_kernel();
  wait_for_previous_kernel();
  const bool notes = blockIdx.x == gridDim.x - 1 && thread == THREADS - 32;
  if (notes) begin_product(work, kept, began);

  Pairs pairs;
#pragma unroll
  for (int h = 0; h < 2; ++h) pairs.expert[h] = h * 32 + lane < num_pairs ? ids[h * 32 + lane] : -1;
  uint4 piece[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int column = (i * THREADS + thread) * 8;
    piece[i] = make_uint4(0, 0, 0, 0);
    if (column < HIDDEN) piece[i] = *(const uint4*)(x + (i64)(pair / TOP_K) * HIDDEN + column);
  }
  if (expert_map) {
#pragma unroll 1
    for (int i = thread; i < min(num_mapped, MAPPED); i += THREADS) map[i] = expert_map[i];
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    pairs.rank[h] = 0;
    if (h * 32 >= num_pairs) continue;
    const int local = pairs.expert[h] = mapped_expert(pairs.expert[h], map, expert_map, num_mapped);
    pairs.rank[h] = count_before(local, mine);
  }

  const int own = __shfl_sync(0xffffffffu, pair < 32 ? pairs.expert[0] : pairs.expert[1], pair & 31);
  const int rank = __shfl_sync(0xffffffffu, pair < 32 ? pairs.rank[0] : pairs.rank[1], pair & 31);
  const int first_row = 8 * num_runs<8>(pairs, own);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int column = (i * THREADS + thread) * 8;
    put(piece[i], own >= 0 && column < HIDDEN, column % BLOCK_K, column / BLOCK_K, first_row + rank, capacity, packed,
        scales);
  }

  if (warp == 0 && own >= 0) {
    if (lane == 0) pair_of_row[first_row + rank] = pair;
    if (rank == 0) {
      const int count = mine[own], first_tile = num_runs<TILE>(pairs, own);
      if (lane >= count && lane < round_up_8(count)) pair_of_row[first_row + lane] = -1;
      if (lane + 32 >= count && lane + 32 < round_up_8(count)) pair_of_row[first_row + lane + 32] = -1;
      if (lane == 0) {
        write_tiles(own, count, (count + TILE - 1) / TILE, first_row, first_tile, granule, tiles, ready);
        if (expert_rows) count_rows(expert_rows + own, count);
      }
    }
  }
  const int num_local = __popc(__ballot_sync(0xffffffffu, pairs.expert[0] >= 0)) +
                        __popc(__ballot_sync(0xffffffffu, pairs.expert[1] >= 0));
  if (pair == 0) {
#pragma unroll 1
    for (int e = thread; e < NUM_EXPERTS; e += THREADS) counts[e] = mine[e];
    const int num_tiles = num_runs<TILE>(pairs, NUM_EXPERTS), num_rows = 8 * num_runs<8>(pairs, NUM_EXPERTS);
    if (thread == 0) *(int4*)state = make_int4(num_tiles, num_rows, num_local, 0);
  }
  if (notes) note_product(work, kept, began, num_local);
}
