// permute_few.cu: route and pack of permute.cu in one launch, for few pairs: the same places, tiles and blocks.
// Every CTA finds all places by itself, in shared memory, and gathers its share of the rows; the first CTAs also write
// down the pair of each row, the last one counts and tiles. One launch and one trip through memory less; the ids are
// read once, into registers.
// Grid: as many CTAs as the rows can use, 16 warps each; warp w owns a run of pairs and a private histogram, so the
// order never changes between runs.
// Needs: at most MAX_PAIRS pairs, NUM_EXPERTS <= 256 local experts; HIDDEN % 64 == 0 (FP8: % 128).
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
#ifndef MAX_PAIRS
#define MAX_PAIRS 4096
#endif
#include "places.cuh"

constexpr int WARPS = 16, THREADS = WARPS * 32;
constexpr int MOST = MAX_PAIRS / THREADS;  // ids of a lane
constexpr int MAX_ROWS = MAX_PAIRS + 7 * (NUM_EXPERTS < MAX_PAIRS ? NUM_EXPERTS : MAX_PAIRS);
static_assert(NUM_EXPERTS <= 256 && MAX_PAIRS % THREADS == 0, "shared memory; a thread for each expert");

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    route_and_pack(const int* __restrict__ ids, int num_pairs, const int* __restrict__ expert_map, int num_mapped,
                   int tile, int granule, const u16* __restrict__ x, i64 capacity, int* counts, int* pair_of_row,
                   int4* tiles, u32* ready, int* state, u8* packed, float* scales, Work* work, u64* expert_rows) {
  __shared__ int histogram[WARPS][NUM_EXPERTS];
  __shared__ int first_row[NUM_EXPERTS];
  __shared__ Work kept;
  __shared__ u64 began;
  __shared__ int row_pair[MAX_ROWS];
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int segment = (num_pairs + THREADS - 1) / THREADS * 32;  // pairs of a warp
  const int begin = warp * segment, end = min(begin + segment, num_pairs);
  const int used_warps = (num_pairs + segment - 1) / segment;
  int* mine = histogram[warp];
  for (int e = lane; e < NUM_EXPERTS; e += 32) mine[e] = 0;
  __syncwarp();
  allow_next_kernel();
  wait_for_previous_kernel();
  const bool notes = blockIdx.x == gridDim.x - 1 && thread == THREADS - 32;
  if (notes) begin_product(work, kept, began);

  // Of each pair: expert << 16 | how many pairs of this warp and expert stand before it; -1 not local.
  int found[MOST];
#pragma unroll
  for (int i = 0; i < MOST; ++i) {
    const int pair = begin + 32 * i + lane;
    found[i] = pair < end ? __ldg(ids + pair) : -1;
  }
#pragma unroll
  for (int i = 0; i < MOST; ++i) {
    if (begin + 32 * i >= end) continue;
    const int local = local_expert(found[i], expert_map, num_mapped);
    const int before = count_before(local, mine);
    found[i] = local >= 0 ? local << 16 | before : -1;
  }
  __syncthreads();

  int count = 0;
  if (thread < NUM_EXPERTS)
#pragma unroll 4
    for (int w = 0; w < used_warps; ++w) {
      const int c = histogram[w][thread];
      histogram[w][thread] = count;
      count += c;
    }
  const Places places = place_experts(count, tile);
  if (thread < NUM_EXPERTS) {
    first_row[thread] = places.first_row;
    for (int pad = count; pad < round_up_8(count); ++pad) row_pair[places.first_row + pad] = -1;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < MOST; ++i)
    if (found[i] >= 0) {
      const int local = found[i] >> 16, before = found[i] & 0xffff;
      row_pair[first_row[local] + mine[local] + before] = begin + 32 * i + lane;
    }
  __syncthreads();

  if (blockIdx.x == gridDim.x - 1) write_places(places, count, granule, counts, tiles, ready, state, expert_rows);
  const int num_rows = places.total_rows;
  for (int row = blockIdx.x * THREADS + thread; row < num_rows; row += gridDim.x * THREADS)
    pair_of_row[row] = row_pair[row];
  const u32 num_groups = num_rows / ROWS, num_items = num_groups * SPANS;
  for (u32 item = blockIdx.x * WARPS + warp; item < num_items; item += gridDim.x * WARPS) {
    const u32 row = item % num_groups * ROWS + lane / LANES;
    gather(x, row_pair[row], row, item / num_groups * LOADS, capacity, packed, scales);
  }
  if (notes) note_product(work, kept, began, places.total_pairs);
}
