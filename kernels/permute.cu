// permute.cu: put (row, k) pairs into expert order, all on the device.
// route: one CTA, or one cluster of ROUTE_CTAS that share the pairs.  Counts pairs per local expert, pads every expert
// to 8 rows, gives each pair its place (stable: by expert,
//   then by pair index), and cuts each expert's rows into tiles of at most TILE rows for the grouped GEMM.
//   Each warp owns a run of pairs and a private histogram, so nothing is atomic and the order never changes between
//   runs.
// pack: gathers rows into k-blocks of 128 bytes, packed[k / 128B][place][128 B], 16-byte pieces swizzled by place & 7:
// what a
//   bulk copy must bring so that wgmma can read it.  FP8: quantises on the way, one float32 scale per row and 128
//   columns.
// Needs: NUM_EXPERTS <= 512 local experts; HIDDEN % 64 == 0 (FP8: % 128).
#include "common.cuh"

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

constexpr int WARPS = NUM_EXPERTS <= 256 ? 32 : 16;
static_assert(NUM_EXPERTS <= WARPS * 32, "one thread per local expert");

constexpr int EXPERT_WARPS = (NUM_EXPERTS + 31) / 32;  // that own an expert
constexpr int BATCH = 8;                               // loads in flight

// One id of every 32, -1 beyond the end.
__device__ __forceinline__ void load_ids(int (&e)[BATCH], const int* ids, i64 first, i64 end) {
#pragma unroll
  for (int i = 0; i < BATCH; ++i) e[i] = first + 32 * i < end ? __ldg(ids + first + 32 * i) : -1;
}

// state[0] tiles, [1] padded rows, [2] pairs, [3] next tile to claim (the grouped GEMM counts it up from 0)
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
          int granule, int* counts, int* pair_of_row, int4* tiles, u32* ready, int* state) {
  __shared__ int histogram[WARPS * NUM_EXPERTS];
  __shared__ int first_row[NUM_EXPERTS];
  __shared__ u64 warp_totals[WARPS];
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int rank = blockIdx.x;  // in the cluster, which is the grid
  const i64 segment = (num_pairs + ROUTE_CTAS * WARPS * 32 - 1) / (ROUTE_CTAS * WARPS * 32) * 32;
  const i64 begin = (rank * WARPS + warp) * segment, end = min(begin + segment, num_pairs);
  const int used_warps = ROUTE_CTAS > 1 ? WARPS : (int)min((i64)WARPS, (num_pairs + segment - 1) / segment);
  for (int i = thread; i < WARPS * NUM_EXPERTS; i += WARPS * 32) histogram[i] = 0;
  __syncthreads();
  allow_next_kernel();
  wait_for_previous_kernel();

  auto local_expert = [&](int id) {
    if (expert_map) id = (u32)id < (u32)num_mapped ? __ldg(expert_map + id) : -1;
    return (u32)id < (u32)NUM_EXPERTS ? id : -1;
  };
  int* mine = histogram + warp * NUM_EXPERTS;
  for (i64 base = begin; base < end; base += 32 * BATCH) {
    int e[BATCH];
    load_ids(e, ids, base + lane, end);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int local = local_expert(e[i]);
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
  const int num_tiles = (count + tile - 1) / tile;
  const u64 own = ((u64)round_up_8(count) << 32) | (u32)num_tiles;
  u64 sum = own;  // inclusive scan over experts of (padded rows, tiles)
  for (int d = 1; d < 32; d <<= 1) {
    const u64 other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) warp_totals[warp] = sum;
  const int pairs_in_warp = __reduce_add_sync(0xffffffffu, count);
  __shared__ int warp_pairs[WARPS];
  if (lane == 0) warp_pairs[warp] = pairs_in_warp;
  __syncthreads();
  u64 before = 0, total = 0;
#pragma unroll 4
  for (int w = 0; w < EXPERT_WARPS; ++w) {
    if (w < warp) before += warp_totals[w];
    total += warp_totals[w];
  }
  if (rank == 0 && thread == 0) {
    int pairs = 0;
#pragma unroll 4
    for (int w = 0; w < EXPERT_WARPS; ++w) pairs += warp_pairs[w];
    state[0] = (int)(u32)total;
    state[1] = (int)(total >> 32);
    state[2] = pairs;
    state[3] = 0;
  }
  if (thread < NUM_EXPERTS) {
    const int row = (int)((before + sum - own) >> 32);
    first_row[thread] = row + earlier_ctas;
  }
  if (rank == 0 && thread < NUM_EXPERTS) {
    const u64 start = before + sum - own;
    const int row = (int)(start >> 32);
    int t = (int)(u32)start;
    counts[thread] = count;
    for (int pad = count; pad < round_up_8(count); ++pad) pair_of_row[row + pad] = -1;
    const int step = num_tiles ? ((count + num_tiles - 1) / num_tiles + granule - 1) / granule * granule : 0;
    for (int done = 0; done < count; done += step, ++t) {
      tiles[t] = make_int4(thread, row + done, min(step, count - done), 0);
      ready[t] = 0;
    }
  }
  __syncthreads();

  for (i64 base = begin; base < end; base += 32 * BATCH) {
    int e[BATCH];
    load_ids(e, ids, base + lane, end);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (base + 32 * i >= end) break;
      const int local = local_expert(e[i]);
      const u32 same = __match_any_sync(0xffffffffu, local);
      const u32 earlier = same & ((1u << lane) - 1);
      const int place = local >= 0 ? mine[local] : 0;
      __syncwarp();
      if (local >= 0) {
        if (!earlier) mine[local] = place + __popc(same);
        pair_of_row[first_row[local] + place + __popc(earlier)] = (int)(base + 32 * i) + lane;
      }
      __syncwarp();
    }
  }
}

// A warp moves ROWS rows x LOADS k-blocks, so that it writes whole runs of 128-byte lines, the warps of a CTA
// neighbouring ones. The rows' number is known only on the device.
extern "C" __global__ void __launch_bounds__(256)
    pack(const u16* __restrict__ x, const int* __restrict__ pair_of_row, const int* __restrict__ state, i64 capacity,
         u8* packed, float* scales) {
  allow_next_kernel();
  wait_for_previous_kernel();
  constexpr int BLOCK_K = FP8 ? 128 : 64, LANES = BLOCK_K / 8, ROWS = 32 / LANES, BLOCKS = HIDDEN / BLOCK_K;
  constexpr int LOADS = BLOCKS % 4 == 0 ? 4 : BLOCKS % 2 == 0 ? 2 : 1, SPANS = BLOCKS / LOADS;
  const int lane = threadIdx.x & 31, column = lane % LANES * 8;
  const u32 num_groups = (u32)__ldg(state + 1) / ROWS, num_items = num_groups * SPANS;
  for (u32 item = blockIdx.x * 8 + (threadIdx.x >> 5); item < num_items; item += gridDim.x * 8) {
    const u32 row = item % num_groups * ROWS + lane / LANES, first = item / num_groups * LOADS;
    const int pair = __ldg(pair_of_row + row);
    const u16* source = x + (i64)(pair / TOP_K) * HIDDEN + first * BLOCK_K + column;
    uint4 loaded[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      loaded[i] = pair >= 0 ? __ldg((const uint4*)(source + i * BLOCK_K)) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const i64 place = (first + i) * capacity + row;
#if FP8
      const u32 word[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
      float f[8], peak = 0.0f;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        f[2 * w] = bf16_low(word[w]);
        f[2 * w + 1] = bf16_high(word[w]);
        peak = fmaxf(peak, fmaxf(fabsf(f[2 * w]), fabsf(f[2 * w + 1])));
      }
#pragma unroll
      for (int d = 1; d < LANES; d <<= 1) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, d));
      const float scale = fp8_scale(peak), inverse = __frcp_rn(scale);
      u16 q[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) q[w] = pack_e4m3(f[2 * w] * inverse, f[2 * w + 1] * inverse);
      if (pair >= 0) {
        u8* line = packed + place * 128;
        *(uint2*)(line + (((column >> 4) ^ (row & 7)) << 4) + (column & 8)) =
            make_uint2(q[0] | (u32)q[1] << 16, q[2] | (u32)q[3] << 16);
        if (column == 0) scales[place] = scale;
      }
#else
      if (pair >= 0) *(uint4*)(packed + place * 128 + (((column >> 3) ^ (row & 7)) << 4)) = loaded[i];
#endif
    }
  }
}
