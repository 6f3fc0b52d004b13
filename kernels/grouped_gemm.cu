// grouped_gemm.cu: y[r, k] = w2[e] @ (silu(w1[e] @ x[r]) * (w3[e] @ x[r])), e = the local expert of pair (r, k).
// One launch. The weights are the wide operand (M of wgmma m64nNk), an expert's rows are N: a tile is M_ROWS outputs x
// up
//   to TILE rows, N cut to what the tile holds, so few rows cost few columns. w13's gate and up rows are interleaved by
//   8 (pack.py): a thread holds gate and up of the same output, and SwiGLU stays in registers.
// Persistent: CTAs claim tiles in order, first all of w13, then all of w2. A w2 tile waits for the counter of its rows'
//   w13 tiles; its weights are already under way meanwhile, so the stream from memory never stops between the products.
//   No deadlock: a claimed w13 tile belongs to a running CTA and waits for nothing.
// CLUSTER 2: two CTAs take neighbouring M tiles of the same rows, each brings half of the rows for both.
// Smem: ring of STAGES x (weights M_ROWS x 128 B + rows TILE x 128 B), bulk copies of packed blocks, one thread for
// each
//   operand. Every output is accumulated over k in one order whatever the tile: a row does not depend on the others.
// FP8: e4m3 both sides, weights 128x128 block scales, rows one scale per 128 columns (w13) or 64 (w2), float32 across
//   blocks.
// Needs: sm_90a; HIDDEN % 128 == 0, INTERMEDIATE % 64 == 0 (FP8: % 256, % 128; CLUSTER 2: whole pairs of tiles);
// experts'
//   rows padded to 8 by permute.cu.
#include "expert_work.cuh"
#include "hopper.cuh"

#ifndef HIDDEN
#define HIDDEN 4096
#define INTERMEDIATE 1536
#define M_ROWS 128
#define TILE 64
#define STAGES 8
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef FP8
#define FP8 0
#endif
#ifndef ROWS_WIDE
#define ROWS_WIDE 0
#endif

constexpr int BLOCK_K = FP8 ? 128 : 64;  // columns in 128 bytes
constexpr int K_BLOCKS_1 = HIDDEN / BLOCK_K, K_BLOCKS_2 = INTERMEDIATE / BLOCK_K;
constexpr int M_TILES_1 = 2 * INTERMEDIATE / M_ROWS, M_TILES_2 = HIDDEN / M_ROWS;
// Warpgroups that multiply; 32 outputs use half of one instruction.
constexpr int WARPGROUPS = ROWS_WIDE && TILE == 192 ? 3 : M_ROWS == 128 ? 2 : 1;
constexpr int A_BYTES = M_ROWS * 128, B_BYTES = TILE * 128, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int SCALE_BYTES = FP8 ? TILE * 8 : 0;
constexpr int CONSUMERS = WARPGROUPS * 128, THREADS = CONSUMERS + 128;
constexpr int QUEUE = 4;
constexpr bool MOVE_REGISTERS = WARPGROUPS >= 2 && TILE >= (FP8 ? 96 : 160);
constexpr bool STAGED = TILE >= 128;  // outputs leave through shared memory and a warp of their own
constexpr int CHUNK_SLOTS = WARPGROUPS == 3 ? 3 : 2, CHUNK_ROWS = 64, CHUNK_PITCH = 272,
              CHUNK_BYTES = CHUNK_ROWS * CHUNK_PITCH, CHUNK_PITCH_FP8 = 80;
constexpr int CHUNK_SCALES = CHUNK_ROWS * CHUNK_PITCH_FP8;  // ROWS_WIDE, w13: where the rows' scales begin
static_assert(!FP8 || M_ROWS == 128, "an output group of 64 is one CTA's");
static_assert(!STAGED || M_ROWS == 128, "a chunk is 128 outputs wide");
static_assert(TILE % 8 == 0 && TILE <= 256, "one wgmma covers the rows of a tile");
static_assert(M_TILES_1 % CLUSTER == 0 && M_TILES_2 % CLUSTER == 0, "a cluster takes whole pairs of tiles");

struct __align__(16) Tile {  // what a CTA does next; expert < 0: nothing
  int expert, entry, first_row, num_rows, m_tile, second, unused[2];
};

struct Barriers {
  u64 full[STAGES], empty[STAGES], queue_full[QUEUE], queue_empty[QUEUE], chunk_full[CHUNK_SLOTS],
      chunk_empty[CHUNK_SLOTS];
};

struct Ring {  // position in a ring of `size` slots; the parity flips at each turn
  int slot = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next(int size) {
    if (++slot == size) slot = 0, parity ^= 1;
  }
};

struct Outputs {
  u8* h;            // [k-block of w2][capacity][128 B] swizzled
  float* h_scales;  // FP8: [INTERMEDIATE / 64][capacity]
  u16* y;           // [pair][HIDDEN]
  const int* pair_of_row;
  u32* ready;
  const float *w13_scales, *w2_scales;  // FP8: [expert][rows / 128][columns / 128]
  i64 capacity;
};

extern __shared__ __align__(1024) u8 ring_memory[];
__shared__ Barriers barriers;
__shared__ Tile queue[QUEUE];
#if FP8 && !ROWS_WIDE
__shared__ float peaks[8][TILE];
__shared__ float tile_scales[TILE];
#endif

// The swizzle is by address: the ring begins at a multiple of 1024. Behind it: row scales, then chunks of output.
__device__ __forceinline__ u32 ring_base() { return shared_address(ring_memory); }
__device__ __forceinline__ u32 stage_a(int slot) { return ring_base() + slot * STAGE_BYTES; }
__device__ __forceinline__ u32 stage_b(int slot) { return stage_a(slot) + A_BYTES; }
__device__ __forceinline__ u32 stage_scales(int slot) {
  return ring_base() + STAGES * STAGE_BYTES + slot * SCALE_BYTES;
}
__device__ __forceinline__ u32 chunk(int slot) {
  return ring_base() + STAGES * (STAGE_BYTES + SCALE_BYTES) + slot * CHUNK_BYTES;
}
__device__ __forceinline__ u32 at(const u64& barrier) { return shared_address(&barrier); }

// The slot's operands are used up; the rows came from both CTAs, so both must know.
__device__ __forceinline__ void hand_back_at(u32 empty) {
  if constexpr (CLUSTER == 1) {
    barrier_arrive(empty);
  } else {
    barrier_arrive_cluster(in_cluster(empty, 0));
    barrier_arrive_cluster(in_cluster(empty, 1));
  }
}

__device__ __forceinline__ void hand_back(int slot) { hand_back_at(at(barriers.empty[slot])); }

// The same values, known to the compiler to be one for the warp: branches on them need no care for divergence.
__device__ __forceinline__ Tile uniform(const Tile& t) {
  auto one = [](int v) { return __shfl_sync(0xffffffffu, v, 0); };
  return {one(t.expert), one(t.entry), one(t.first_row), one(t.num_rows), one(t.m_tile), one(t.second)};
}

// The next tile, as every role but the claiming thread sees it: a whole warp, or one thread.
template <bool WHOLE_WARP>
__device__ __forceinline__ Tile next_tile(Ring& q) {
  barrier_wait(at(barriers.queue_full[q.slot]), q.parity);
  Tile tile = queue[q.slot];
  if constexpr (WHOLE_WARP) tile = uniform(tile), __syncwarp();
  if (!WHOLE_WARP || arrives(threadIdx.x & 31)) {
    const u32 empty = at(barriers.queue_empty[q.slot]);
    if constexpr (CLUSTER == 1)
      barrier_arrive(empty);
    else
      barrier_arrive_cluster(in_cluster(empty, 0));
  }
  q.next(QUEUE);
  return tile;
}

#include "grouped_gemm_math.cuh"
#include "grouped_gemm_store.cuh"
#if ROWS_WIDE
#include "grouped_gemm_rows_wide.cuh"
#endif

// Which tile claim number `t` is, without its rows; expert -1: no tile is left.
__device__ __forceinline__ Tile tile_number(u32 t, u32 num_entries) {
  constexpr u32 STEPS_1 = M_TILES_1 / CLUSTER, STEPS_2 = M_TILES_2 / CLUSTER;
  Tile tile = {-1};
  if (t < num_entries * (STEPS_1 + STEPS_2)) {
    tile.second = t >= num_entries * STEPS_1;
    const u32 rest = tile.second ? t - num_entries * STEPS_1 : t;
    tile.expert = 0;
    tile.entry = rest / (tile.second ? STEPS_2 : STEPS_1);
    tile.m_tile = rest % (tile.second ? STEPS_2 : STEPS_1) * CLUSTER;
  }
  return tile;
}

__device__ __forceinline__ Tile claimed_tile(u32 t, u32 num_entries, const int4* tiles) {
  Tile tile = tile_number(t, num_entries);
  if (tile.expert >= 0) {
    const int4 rows = __ldg(tiles + tile.entry);
    tile.expert = rows.x, tile.first_row = rows.y, tile.num_rows = rows.z;
  }
  return tile;
}

// The CTA's first tile, by a whole warp: the first entries of the list are read beside the claim, not after it. The
// list has memory for 32 whatever its length. The first is claimed like all others: a CTA that never starts, because
// another kernel that waits for this one's output holds its multiprocessor, owes nothing.
__device__ __forceinline__ Tile first_tile(bool claims, u32 num_entries, const int4* tiles, int* state, int lane) {
  const int4 early = __ldg(tiles + lane);
  u32 t = claims && lane == 0 ? atomicAdd((u32*)state + 3, 1) : 0;
  t = __shfl_sync(0xffffffffu, t, 0);
  Tile tile = tile_number(t, num_entries);
  if (tile.expert >= 0 && tile.entry < 32) {
    tile.expert = __shfl_sync(0xffffffffu, early.x, tile.entry);
    tile.first_row = __shfl_sync(0xffffffffu, early.y, tile.entry);
    tile.num_rows = __shfl_sync(0xffffffffu, early.z, tile.entry);
  } else {
    tile = claimed_tile(t, num_entries, tiles);
  }
  return tile;
}

// Tells every role of the cluster.
__device__ __forceinline__ void announce(const Tile& tile, Ring& q) {
  barrier_wait(at(barriers.queue_empty[q.slot]), q.parity ^ 1);
  queue[q.slot] = tile;
  if constexpr (CLUSTER == 2) {
    const u32 other = in_cluster(shared_address(&queue[q.slot]), 1);
    const u32 full = in_cluster(at(barriers.queue_full[q.slot]), 1);
    store_cluster_async(other, tile.expert, tile.entry, tile.first_row, tile.num_rows, full);
    store_cluster_async(other + 16, tile.m_tile + 1, tile.second, 0, 0, full);
  }
  barrier_arrive(at(barriers.queue_full[q.slot]));
  q.next(QUEUE);
}

// Addresses that a loop over the ring keeps in registers: asked for anew they are a read of a special register each.
struct Slots {
  u32 base, full, empty;
};

__device__ __forceinline__ Slots kept_slots() {
  return {keep(ring_base()), keep(at(barriers.full[0])), keep(at(barriers.empty[0]))};
}

// The next `count` k-blocks of a tile's weights. Nothing else is in the loop: its length bounds how fast a narrow tile
// streams.
__device__ __forceinline__ void stream_weights(const u8*& from, int count, const Slots& slots, Ring& ring, u64 policy) {
#pragma unroll 1
  for (; count > 0; --count, from += 16384, ring.next(STAGES)) {
    const u32 full = slots.full + ring.slot * 8, to = slots.base + ring.slot * STAGE_BYTES;
    barrier_wait(slots.empty + ring.slot * 8, ring.parity ^ 1);
    barrier_arrive_expect(full, A_BYTES);
    if constexpr (TILE <= 64)  // few rows: every weight is read once
      bulk_load_once(to, from, A_BYTES, full, policy);
    else
      bulk_load(to, from, A_BYTES, full);
  }
}

// One thread: claims tiles, or hears of them, and streams weights. The next tile is claimed and announced while this
// one's weights are on their way: the answers of two reads of memory would else be waited for at every tile.
__device__ __forceinline__ void produce_weights(bool claims, const u8* w13, const u8* w2, const int4* tiles, int* state,
                                                Tile next, u32 num_entries) {
  const u64 policy = evict_first_policy();
  const Slots slots = kept_slots();
  Ring ring, q;
  u32 t = 0;
  if (claims) announce(next, q);
  while (true) {
    if (!claims) {
      barrier_arrive_expect(at(barriers.queue_full[q.slot]), sizeof(Tile));  // what the other CTA will store here
      next = next_tile<false>(q);
    }
    const Tile tile = next;
    if (tile.expert < 0) return;
    const int k_blocks = tile.second ? K_BLOCKS_2 : K_BLOCKS_1, row = tile.m_tile * M_ROWS, third = (k_blocks - 1) / 3;
    const i64 block = (i64)tile.expert * ((tile.second ? HIDDEN : 2 * INTERMEDIATE) / 128) + row / 128;
    const u8* from = (tile.second ? w2 : w13) + block * k_blocks * 16384 + row % 128 * 128;
    stream_weights(from, 1, slots, ring, policy);
    if (claims) t = atomicAdd((u32*)state + 3, 1);
    stream_weights(from, third, slots, ring, policy);
    if (claims) next = claimed_tile(t, num_entries, tiles);
    stream_weights(from, third, slots, ring, policy);
    if (claims) announce(next, q);
    stream_weights(from, k_blocks - 1 - 2 * third, slots, ring, policy);
  }
}

// How many w13 tiles of the next tile's rows are finished, as far as it is known already.
__device__ __forceinline__ u32 next_finished(const Ring& q, const u32* ready) {
  if (!barrier_try_wait(at(barriers.queue_full[q.slot]), q.parity)) return 0;
  const Tile& next = queue[q.slot];
  return next.expert >= 0 && next.second ? load_acquire(ready + next.entry) : 0;
}

// One thread: streams the rows of each tile: x for w13, the SwiGLU rows for w2 once they are complete.
__device__ __forceinline__ void produce_rows(const u8* x, const u8* h, const float* x_scales, const float* h_scales,
                                             const u32* ready, i64 capacity) {
  const u32 rank = CLUSTER == 1 ? 0 : cluster_rank();
  const Slots slots = kept_slots();
  Ring ring, q;
  u32 finished = 0;  // w13 tiles of the next tile's rows, as seen a while ago
  while (true) {
    const Tile tile = next_tile<false>(q);
    if (tile.expert < 0) return;
    if (tile.second) {
#if WATCHDOG
      u32 tries = 0;
#endif
      while (finished < M_TILES_1 && load_acquire(ready + tile.entry) < M_TILES_1) {
        __nanosleep(64);
#if WATCHDOG
        if (++tries > (1u << 22)) __trap();
#endif
      }
      fence_async_proxy();
    }
    const int k_blocks = tile.second ? K_BLOCKS_2 : K_BLOCKS_1, rows = round_up_8(tile.num_rows);
    const int half = CLUSTER == 1 ? rows : round_up_8(rows / 2);  // this CTA brings rows [begin, begin + count)
    const int begin = rank * half, count = rank ? rows - half : half;
    const u8* from = (tile.second ? h : x) + (i64)(tile.first_row + begin) * 128;
#if FP8
    const float* scales = (tile.second ? h_scales : x_scales) + tile.first_row;
#endif
#pragma unroll 1
    for (int kb = 0; kb < k_blocks; ++kb, from += capacity * 128, ring.next(STAGES)) {
      const u32 full = slots.full + ring.slot * 8, to = slots.base + ring.slot * STAGE_BYTES + A_BYTES;
      barrier_wait(slots.empty + ring.slot * 8, ring.parity ^ 1);
#if FP8
      barrier_arrive_expect(full, rows * (tile.second ? 136 : 132));
      const u32 scales_to = slots.base + STAGES * STAGE_BYTES + ring.slot * SCALE_BYTES;
      bulk_load(scales_to, scales, rows * 4, full);
      scales += capacity;
      if (tile.second) {
        bulk_load(scales_to + TILE * 4, scales, rows * 4, full);
        scales += capacity;
      }
#else
      barrier_arrive_expect(full, rows * 128);
#endif
      if constexpr (CLUSTER == 1)
        bulk_load(to, from, rows * 128, full);
      else if (count > 0)
        bulk_load_both(to + begin * 128, from, count * 128, full);
    }
    finished = next_finished(q, ready);
  }
}

#if !ROWS_WIDE
template <int N>
__device__ __forceinline__ void run_tile(const Tile& tile, int group, Ring& ring, Ring& chunks, const Outputs& out) {
  float acc[N / 2];
  multiply<N>(acc, tile, group, ring, out);
  if (tile.second)
    store_rows<N>(acc, tile, group, chunks, out);
  else
    store_swiglu<N>(acc, tile, group, chunks, out);
}

// The narrowest instruction that covers the tile's rows.
__device__ __forceinline__ void run(const Tile& tile, int group, Ring& ring, Ring& chunks, const Outputs& out) {
  const int n = tile.num_rows;
#define COVER(N)                                                                    \
  if constexpr (N <= TILE && (N >= 64 || TILE <= 128) && (N != 112 || TILE == 112)) \
    if (n <= N) return run_tile<N>(tile, group, ring, chunks, out);
  COVER(8) COVER(16) COVER(32) COVER(64) COVER(96) COVER(112) COVER(128) COVER(160) COVER(192) COVER(224) COVER(256)
#undef COVER
}
#else
__device__ __forceinline__ void run(const Tile& tile, int group, Ring& ring, Ring& chunks, const Outputs& out) {
  run_rows(tile, group, ring, chunks, out);
}
#endif

#if CLUSTER == 2
#define CLUSTER_OF_TWO __cluster_dims__(2, 1, 1)
#else
#define CLUSTER_OF_TWO
#endif
extern "C" __global__ void CLUSTER_OF_TWO __launch_bounds__(THREADS, 1)
    grouped_gemm(const u8* w13, const u8* w2, const float* w13_scales, const float* w2_scales, const u8* x,
                 const float* x_scales, u8* h, float* h_scales, u16* y, const int* pair_of_row, const int4* tiles,
                 u32* ready, int* state, i64 capacity, Work* work) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    if (ring_base() & 1023) __trap();
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(at(barriers.full[i]), 2);                                          // one arrival for each operand
      barrier_init(at(barriers.empty[i]), CLUSTER * WARPGROUPS * 4 * WARP_ARRIVALS);  // consumer warps
    }
    for (int i = 0; i < QUEUE; ++i) {
      barrier_init(at(barriers.queue_full[i]), 1);
      barrier_init(at(barriers.queue_empty[i]), CLUSTER * ((WARPGROUPS * 4 + STAGED) * WARP_ARRIVALS + 2) - 1);
    }
    for (int i = 0; i < CHUNK_SLOTS; ++i) {
      barrier_init(at(barriers.chunk_full[i]), (ROWS_WIDE ? 4 : WARPGROUPS * 4) * WARP_ARRIVALS);  // its writers
      barrier_init(at(barriers.chunk_empty[i]), WARP_ARRIVALS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if constexpr (CLUSTER == 1)
    __syncthreads();
  else
    cluster_sync();
  allow_next_kernel();
  wait_for_previous_kernel();

  const Outputs out = {h, h_scales, y, pair_of_row, ready, w13_scales, w2_scales, capacity};
  if (warp < 4) {
    if constexpr (MOVE_REGISTERS) registers_down<56>();
    if (warp == 0) {
      const bool claims = CLUSTER == 1 || cluster_rank() == 0;
      const u32 num_entries = __ldg(state);
      const Tile first = first_tile(claims, num_entries, tiles, state, lane);
      if (elect_one()) produce_weights(claims, w13, w2, tiles, state, first, num_entries);
    }
    if (warp == 1 && elect_one()) produce_rows(x, h, x_scales, h_scales, ready, capacity);
    if (STAGED && warp == 2) drain_chunks(lane, out);
    __syncwarp();
  } else {
    if constexpr (MOVE_REGISTERS) registers_up<WARPGROUPS == 3 ? 152 : 224>();
    const int group = (warp >> 2) - 1;
    Ring ring, q, chunks;
    while (true) {
      const Tile tile = next_tile<true>(q);
      if (tile.expert < 0) break;
      run(tile, group, ring, chunks, out);
    }
  }
  if (warp == (STAGED ? 2 : 4) && lane == 0) end_product(work);  // of those that store rows
  if constexpr (CLUSTER == 2) cluster_sync();  // the other CTA may still arrive on this one's barriers
}
