// dense_w8a8.cu: y = x @ w^T for many rows, e4m3 both sides: rows with a scale for each 128 columns (quantize_rows.cu),
// weights with one for each 128x128 block; float32 across blocks, bf16 out.  sm_90a: wgmma m64n128k32, rows are M.
// A tile is 64 rows a warpgroup x 128 outputs.  CTAs take whole tiles in turn while there is one for each of them; what
//   is left is one run of blocks of which each CTA takes an equal part. Sums of a tile that several share meet in
//   memory and are added in the order of k by the last one to come; nobody waits for anybody.
// Smem: ring of STAGES x (weights 128 x 128 B, rows TILE x 128 B), bulk copies by one thread; behind it the rows'
// scales. Needs: K % 128 == 0, num_outputs % 128 == 0.  Idea: the scaled promotion of DeepGEMM, hybrid stream-K (Osama
// et al.).
#include "hopper.cuh"

#ifndef K
#define K 4096
#define TILE 128
#define STAGES 6
#endif

constexpr int K_BLOCKS = K / 128, WARPGROUPS = TILE / 64, CONSUMERS = WARPGROUPS * 128, THREADS = CONSUMERS + 128;
constexpr int A_BYTES = TILE * 128, B_BYTES = 16384, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr bool MOVE_REGISTERS = WARPGROUPS == 3;
static_assert(K % 128 == 0 && TILE % 64 == 0 && TILE <= 192, "dense_w8a8.cu: K or TILE");

extern __shared__ __align__(1024) u8 ring_memory[];
__shared__ u64 full[STAGES], empty[STAGES];
__shared__ u32 is_last;

__device__ __forceinline__ u32 at(const u64& barrier) { return shared_address(&barrier); }

struct Ring {  // position in a ring; the parity flips at each turn
  int slot = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ u32 rows() const { return shared_address(ring_memory) + slot * STAGE_BYTES; }
  __device__ __forceinline__ u32 weights() const { return rows() + A_BYTES; }
  __device__ __forceinline__ u32 scales() const {
    return shared_address(ring_memory) + STAGES * STAGE_BYTES + slot * TILE * 4;
  }
};

// This CTA's work, piece by piece: k-blocks [first, last) of a tile.
struct Work {
  u32 tile, first, last;
  u32 whole, shared_blocks;    // tiles from `whole` on are shared
  u32 sharers;                 // by so many CTAs, none with nothing and hardly one with less than four blocks
  u32 next_whole, block, end;  // what is left of this CTA's part

  __device__ __forceinline__ explicit Work(u32 num_tiles) : next_whole(blockIdx.x) {
    whole = num_tiles / gridDim.x * gridDim.x;
    shared_blocks = (num_tiles - whole) * K_BLOCKS;
    sharers = max(1u, min(gridDim.x, shared_blocks / 4));
    block = begin(blockIdx.x), end = begin(blockIdx.x + 1);
  }
  __device__ __forceinline__ u32 begin(u32 cta) const { return (u64)min(cta, sharers) * shared_blocks / sharers; }
  __device__ __forceinline__ u32 owner(u32 b) const { return ((u64)(b + 1) * sharers - 1) / shared_blocks; }
  __device__ __forceinline__ bool next() {
    if (next_whole < whole) {
      tile = next_whole, first = 0, last = K_BLOCKS;
      next_whole += gridDim.x;
      return true;
    }
    if (block >= end) return false;
    tile = whole + block / K_BLOCKS, first = block % K_BLOCKS;
    last = min((u32)K_BLOCKS, first + end - block);
    block += last - first;
    return true;
  }
};

// One thread.
__device__ __forceinline__ void produce(const u8* w, const u8* x, const float* x_scales, i64 capacity, Work work,
                                        u32 m_tiles) {
  Ring ring;
  while (work.next()) {
    const u8* weights = w + ((i64)(work.tile % m_tiles) * K_BLOCKS + work.first) * B_BYTES;
    const i64 row = (i64)work.first * capacity + (i64)(work.tile / m_tiles) * TILE;
    const u8* rows = x + row * 128;
    const float* scales = x_scales + row;
#pragma unroll 1
    for (u32 k = work.first; k < work.last; ++k, ring.next()) {
      const u32 barrier = at(full[ring.slot]);
      barrier_wait(at(empty[ring.slot]), ring.parity ^ 1);
      barrier_arrive_expect(barrier, STAGE_BYTES + TILE * 4);
      bulk_load(ring.weights(), weights, B_BYTES, barrier);
      bulk_load(ring.rows(), rows, A_BYTES, barrier);
      bulk_load(ring.scales(), scales, TILE * 4, barrier);
      weights += B_BYTES, rows += capacity * 128, scales += capacity;
    }
  }
}

// acc = a warpgroup's 64 rows by 128 outputs over the piece's k-blocks.
__device__ __forceinline__ void multiply(float (&acc)[64], const Work& work, const float* scales, int group, int row,
                                         Ring& ring, int lane) {
#pragma unroll
  for (int i = 0; i < 64; ++i) acc[i] = 0.0f;
  float next = __ldg(scales + work.first);
#pragma unroll 1
  for (u32 k = work.first; k < work.last; ++k, ring.next()) {
    const float scale = next;
    next = __ldg(scales + min(k + 1, K_BLOCKS - 1));  // a turn ahead
    barrier_wait(at(full[ring.slot]), ring.parity);
    const u64 a = operand_descriptor(ring.rows() + group * 8192), b = operand_descriptor(ring.weights());
    float product[64];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) Wgmma<128>::e4m3(product, a + 2 * step, b + 2 * step, step);
    wgmma_commit();
    const float upper = scale * load_shared_float(ring.scales() + row * 4),
                lower = scale * load_shared_float(ring.scales() + row * 4 + 32);
    wgmma_wait<0>();
    pin_registers(product);
    __syncwarp();
    if (arrives(lane)) barrier_arrive(at(empty[ring.slot]));
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i] = __fmaf_rn(product[i], i & 2 ? lower : upper, acc[i]);
  }
}

// A CTA has two places for sums of shared tiles: of the one that it begins with, and of the one that it begins.
__device__ __forceinline__ float* place_of(float* partial, const Work& work, u32 cta) {
  const u32 place = 2 * cta + (work.begin(cta) < (work.tile - work.whole) * K_BLOCKS);
  return partial + (i64)place * (TILE * 128) + (threadIdx.x - 128);
}

// Leave the sums of a shared tile. True for the last CTA of those who share it, which gets them all.
__device__ __forceinline__ bool gather_shared(float (&acc)[64], const Work& work, float* partial, u32* counters) {
  const u32 shared = work.tile - work.whole;
  const u32 first = work.owner(shared * K_BLOCKS), last = work.owner((shared + 1) * K_BLOCKS - 1);
  float* mine = place_of(partial, work, blockIdx.x);
#pragma unroll
  for (int i = 0; i < 64; ++i) __stcg(mine + i * CONSUMERS, acc[i]);
  named_barrier(1, CONSUMERS);
  if (threadIdx.x == 128) {
    is_last = add_acquire_release(counters + shared, 1) == last - first;
    if (is_last) counters[shared] = 0;  // for the next launch
  }
  named_barrier(1, CONSUMERS);
  if (!is_last) return false;
  for (u32 cta = first; cta <= last; ++cta) {
    const float* theirs = place_of(partial, work, cta);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const float v = __ldcg(theirs + i * CONSUMERS);
      acc[i] = cta == first ? v : acc[i] + v;
    }
  }
  return true;
}

__device__ __forceinline__ void store(const float (&acc)[64], u16* y, int row, int num_rows, int num_outputs,
                                      int lane) {
  u16* to = y + (i64)row * num_outputs + (lane & 3) * 2;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    if (row < num_rows) *(u32*)(to + j * 8) = pack_bf16(acc[4 * j], acc[4 * j + 1]);
    if (row + 8 < num_rows) *(u32*)(to + 8 * (i64)num_outputs + j * 8) = pack_bf16(acc[4 * j + 2], acc[4 * j + 3]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dense_w8a8(const u8* w, const float* scales, const u8* x, const float* x_scales, i64 capacity, int num_rows, u16* y,
               int num_outputs, float* partial, u32* counters) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(at(full[i]), 1);
      barrier_init(at(empty[i]), WARPGROUPS * 4 * WARP_ARRIVALS);
    }
    barriers_visible();
  }
  __syncthreads();
  allow_next_kernel();
  wait_for_previous_kernel();
  const u32 m_tiles = num_outputs / 128;
  Work work((u32)((num_rows + TILE - 1) / TILE) * m_tiles);
  if (warp < 4) {
    if constexpr (MOVE_REGISTERS) registers_down<40>();
    if (threadIdx.x == 0) produce(w, x, x_scales, capacity, work, m_tiles);
    __syncwarp();
  } else {
    if constexpr (MOVE_REGISTERS) registers_up<152>();
    const int group = (warp >> 2) - 1, row = group * 64 + (warp & 3) * 16 + (lane >> 2);
    Ring ring;
    while (work.next()) {
      const u32 m = work.tile % m_tiles;
      float acc[64];
      multiply(acc, work, scales + m * K_BLOCKS, group, row, ring, lane);
      if (work.last - work.first < K_BLOCKS && !gather_shared(acc, work, partial, counters)) continue;
      store(acc, y + m * 128, work.tile / m_tiles * TILE + row, num_rows, num_outputs, lane);
    }
  }
}
