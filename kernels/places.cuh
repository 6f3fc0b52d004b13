// places.cuh: what permute.cu, permute_few.cu and permute_pairs.cu share: where an expert's rows and tiles begin, and
// how rows are gathered into the blocks that the products read.
#pragma once
#include "expert_work.cuh"

constexpr int EXPERT_WARPS = (NUM_EXPERTS + 31) / 32;  // that own an expert

// Local expert of an id, -1 none.
__device__ __forceinline__ int local_expert(int id, const int* expert_map, int num_mapped) {
  if (expert_map) id = (u32)id < (u32)num_mapped ? __ldg(expert_map + id) : -1;
  return (u32)id < (u32)NUM_EXPERTS ? id : -1;
}

// How many pairs of expert `local` (-1 none: any number) stand before the lane's own: those that `counted` holds, and
// those of lower lanes. Counts all of the warp's. All lanes; `counted` is the warp's own.
template <class T>
__device__ __forceinline__ int count_before(int local, T* counted) {
  const u32 same = __match_any_sync(0xffffffffu, local);
  const u32 earlier = same & ((1u << (threadIdx.x & 31)) - 1);
  const int before = local >= 0 ? counted[local] : 0;
  __syncwarp();
  if (local >= 0 && !earlier) counted[local] = before + __popc(same);
  __syncwarp();
  return before + __popc(earlier);
}

struct Places {  // of the thread's expert, and of all
  int first_row, first_tile, num_tiles;
  int total_rows, total_tiles, total_pairs;
};

// Thread e holds the pairs of expert e in `count` (threads without an expert: 0). Rows are padded to 8. All threads.
__device__ __forceinline__ Places place_experts(int count, int tile) {
  __shared__ u64 warp_totals[EXPERT_WARPS];
  __shared__ int warp_pairs[EXPERT_WARPS];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int num_tiles = (count + tile - 1) / tile;
  const u64 own = ((u64)round_up_8(count) << 32) | (u32)num_tiles;
  u64 sum = own;  // inclusive scan over experts of (padded rows, tiles)
  for (int d = 1; d < 32; d <<= 1) {
    const u64 other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  const int pairs = __reduce_add_sync(0xffffffffu, count);
  if (lane == 31 && warp < EXPERT_WARPS) warp_totals[warp] = sum, warp_pairs[warp] = pairs;
  __syncthreads();
  u64 before = 0, total = 0;
  int total_pairs = 0;
#pragma unroll 4
  for (int w = 0; w < EXPERT_WARPS; ++w) {
    if (w < warp) before += warp_totals[w];
    total += warp_totals[w];
    total_pairs += warp_pairs[w];
  }
  const u64 start = before + sum - own;
  return {(int)(start >> 32), (int)(u32)start, num_tiles, (int)(total >> 32), (int)(u32)total, total_pairs};
}

// An expert's rows in n tiles, as few as hold them, evenly.
__device__ __forceinline__ void write_tiles(int expert, int count, int n, int first_row, int first_tile, int granule,
                                            int4* tiles, u32* ready) {
  const int step = n > 1 ? ((count + n - 1) / n + granule - 1) / granule * granule : count;
  for (int done = 0, t = first_tile; done < count; done += step, ++t) {
    tiles[t] = make_int4(expert, first_row + done, min(step, count - done), 0);
    ready[t] = 0;
  }
}

// What one CTA writes of it. state[0] tiles, [1] padded rows, [2] pairs, [3] next tile to claim (the grouped GEMM
// counts it up from 0). `rows` of each expert since the host has set them to 0; null: nobody asks.
__device__ __forceinline__ void write_places(const Places& places, int count, int granule, int* counts, int4* tiles,
                                             u32* ready, int* state, u64* rows) {
  if (threadIdx.x == 0) *(int4*)state = make_int4(places.total_tiles, places.total_rows, places.total_pairs, 0);
  if (threadIdx.x >= NUM_EXPERTS) return;
  counts[threadIdx.x] = count;
  if (rows) count_rows(rows + threadIdx.x, count);
  write_tiles(threadIdx.x, count, places.num_tiles, places.first_row, places.first_tile, granule, tiles, ready);
}

// A warp moves ROWS rows x LOADS blocks at a time, so that it writes whole runs of 128-byte lines.
constexpr int BLOCK_K = FP8 ? 128 : 64, LANES = BLOCK_K / 8, ROWS = 32 / LANES, BLOCKS = HIDDEN / BLOCK_K;
constexpr int LOADS = BLOCKS % 4 == 0 ? 4 : BLOCKS % 2 == 0 ? 2 : 1, SPANS = BLOCKS / LOADS;

// 8 columns of padded row `row`, from column % BLOCK_K == `column` on of block `block`; `used`: there is such a row,
// else nothing is written. FP8: quantised, one float32 scale for each block; LANES neighbouring lanes have its columns.
__device__ __forceinline__ void put(uint4 piece, bool used, int column, i64 block, u32 row, i64 capacity, u8* packed,
                                    float* scales) {
  const i64 place = block * capacity + row;
#if FP8
  const u32 word[4] = {piece.x, piece.y, piece.z, piece.w};
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
  if (used) {
    u8* line = packed + place * 128;
    *(uint2*)(line + (((column >> 4) ^ (row & 7)) << 4) + (column & 8)) =
        make_uint2(q[0] | (u32)q[1] << 16, q[2] | (u32)q[3] << 16);
    if (column == 0) scales[place] = scale;
  }
#else
  if (used) *(uint4*)(packed + place * 128 + (((column >> 3) ^ (row & 7)) << 4)) = piece;
#endif
}

// Blocks `first` .. first + LOADS of padded row `row`, which is pair `pair`'s (-1: padding, nothing is written). All
// lanes.
__device__ __forceinline__ void gather(const u16* x, int pair, u32 row, u32 first, i64 capacity, u8* packed,
                                       float* scales) {
  const int column = (threadIdx.x & 31) % LANES * 8;
  const u16* source = x + (i64)(pair / TOP_K) * HIDDEN + first * BLOCK_K + column;
  uint4 loaded[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; ++i)
    loaded[i] = pair >= 0 ? __ldg((const uint4*)(source + i * BLOCK_K)) : make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < LOADS; ++i) put(loaded[i], pair >= 0, column, first + i, row, capacity, packed, scales);
}
