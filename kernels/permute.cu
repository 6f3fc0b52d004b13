// permute.cu: put (row, k) pairs into expert order, all on the device.
// route: one CTA, or one cluster of ROUTE_CTAS that share the pairs. Counts pairs per local expert, pads every expert
// to 8 rows, gives each pair its place (stable: by expert, then by pair index), and cuts each expert's rows into tiles
// of at most `tile` rows for the grouped GEMM. Each warp owns a run of pairs and a private histogram, so the order
// never changes between runs.
// pack: gathers rows into k-blocks of 128 bytes, packed[k / 128B][place][128 B], 16-byte pieces swizzled by place & 7:
// what a bulk copy must bring so that wgmma can read it. FP8: quantises on the way, one float32 scale per row and 128
// columns.
// Few pairs: permute_few.cu and permute_pairs.cu do both in one launch.
// Needs: NUM_EXPERTS <= 512 local experts; HIDDEN % 64 == 0 (FP8: % 128).
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
#ifndef ROUTE_CTAS
#define ROUTE_CTAS 1
#endif
#include "places.cuh"

constexpr int WARPS = NUM_EXPERTS <= 256 ? 32 : 16;
static_assert(NUM_EXPERTS <= WARPS * 32, "one thread per local expert");
constexpr int BATCH = 8;  // loads in flight

// One id of every 32, -1 beyond the end.
__device__ __forceinline__ void load_ids(int (&e)[BATCH], const int* ids, i64 first, i64 end) {
#pragma unroll
  for (int i = 0; i < BATCH; ++i) e[i] = first + 32 * i < end ? __ldg(ids + first + 32 * i) : -1;
}

#if ROUTE_CTAS > 1
#define ROUTE_CLUSTER __cluster_dims__(ROUTE_CTAS, 1, 1)
__device__ __forceinline__ void all_ctas_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same shared variable in CTA `rank` of the cluster.
__device__ __forceinline__ int load_from_cta(const int* p, int rank) {
  int v;
  asm volatile("{.reg .u32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.s32 %0, [a];}"
               : "=r"(v)
               : "r"((u32)__cvta_generic_to_shared(p)), "r"(rank)
               : "memory");
  return v;
}
#else
#define ROUTE_CLUSTER
#endif

extern "C" __global__ void ROUTE_CLUSTER __launch_bounds__(WARPS * 32, 1)
    route(const int* __restrict__ ids, i64 num_pairs, const int* __restrict__ expert_map, int num_mapped, int tile,
          int granule, int* counts, int* pair_of_row, int4* tiles, u32* ready, int* state, Work* work, u64* rows) {
  __shared__ int histogram[WARPS * NUM_EXPERTS];
  __shared__ int first_row[NUM_EXPERTS];
  __shared__ Work kept;
  __shared__ u64 began;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int rank = blockIdx.x;  // in the cluster, which is the grid
  const i64 segment = (num_pairs + ROUTE_CTAS * WARPS * 32 - 1) / (ROUTE_CTAS * WARPS * 32) * 32;
  const i64 begin = (rank * WARPS + warp) * segment, end = min(begin + segment, num_pairs);
  const int used_warps = ROUTE_CTAS > 1 ? WARPS : (int)min((i64)WARPS, (num_pairs + segment - 1) / segment);
  for (int i = thread; i < WARPS * NUM_EXPERTS; i += WARPS * 32) histogram[i] = 0;
  __syncthreads();
  allow_next_kernel();
  wait_for_previous_kernel();
  const bool notes = rank == 0 && thread == (WARPS - 1) * 32;
  if (notes) begin_product(work, kept, began);

  int* mine = histogram + warp * NUM_EXPERTS;
  for (i64 base = begin; base < end; base += 32 * BATCH) {
    int e[BATCH];
    load_ids(e, ids, base + lane, end);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int local = local_expert(e[i], expert_map, num_mapped);
      if (local >= 0) atomicAdd(mine + local, 1);  // a count: the order of additions does not show
    }
  }
  __syncthreads();

  int count = 0;
  if (thread < NUM_EXPERTS)
#pragma unroll 4
    for (int w = 0; w < used_warps; ++w) {
      const int c = histogram[w * NUM_EXPERTS + thread];
      histogram[w * NUM_EXPERTS + thread] = count;
      count += c;
    }
  int earlier_ctas = 0;
#if ROUTE_CTAS > 1
  __shared__ int totals[NUM_EXPERTS];
  if (thread < NUM_EXPERTS) totals[thread] = count;
  all_ctas_sync();
  count = 0;
  if (thread < NUM_EXPERTS)
#pragma unroll
    for (int r = 0; r < ROUTE_CTAS; ++r) {
      const int c = load_from_cta(totals + thread, r);
      if (r < rank) earlier_ctas += c;
      count += c;
    }
  all_ctas_sync();  // nobody leaves while its totals are read
#endif
  const Places places = place_experts(count, tile);
  if (thread < NUM_EXPERTS) first_row[thread] = places.first_row + earlier_ctas;
  if (rank == 0) {
    write_places(places, count, granule, counts, tiles, ready, state, rows);
    for (int pad = count; pad < round_up_8(count); ++pad) pair_of_row[places.first_row + pad] = -1;
  }
  __syncthreads();

  for (i64 base = begin; base < end; base += 32 * BATCH) {
    int e[BATCH];
    load_ids(e, ids, base + lane, end);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (base + 32 * i >= end) break;
      const int local = local_expert(e[i], expert_map, num_mapped);
      const int before = count_before(local, mine);
      if (local >= 0) pair_of_row[first_row[local] + before] = (int)(base + 32 * i) + lane;
    }
  }
  if (notes) note_product(work, kept, began, places.total_pairs);
}

// The warps of a CTA move neighbouring rows. Their number is known only on the device.
extern "C" __global__ void __launch_bounds__(256)
    pack(const u16* __restrict__ x, const int* __restrict__ pair_of_row, const int* __restrict__ state, i64 capacity,
         u8* packed, float* scales) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31;
  const u32 num_groups = (u32)__ldg(state + 1) / ROWS, num_items = num_groups * SPANS;
  for (u32 item = blockIdx.x * 8 + (threadIdx.x >> 5); item < num_items; item += gridDim.x * 8) {
    const u32 row = item % num_groups * ROWS + lane / LANES;
    gather(x, __ldg(pair_of_row + row), row, item / num_groups * LOADS, capacity, packed, scales);
  }
}
