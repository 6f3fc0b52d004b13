// thin_experts.cu: both expert products of one token: y[k] = w2[e] @ (silu(w1[e] @ x) * (w3[e] @ x)), e = the local
// expert of pair k. One launch for what is otherwise route, pack and the products: with one row there is nothing to put
// in order.
//
// A warp takes 16 outputs at a time over all of their columns: 8 gate rows and the 8 up rows of the same outputs (so
// w13 is interleaved, pack.py), or 16 rows of w2. Its weights go through a ring of its own, STAGES pieces of 16 rows x
// 128 bytes, into mma.sync, with no barrier but the warp's. Loads run on across the warp's groups, so w2's weights are
// there when the last of h comes. Groups are claimed in order: a CTA that has not started owes nothing, so who waits
// for h waits for warps that run. The last warps of a CTA begin with w2: as many as take w13 have it all at once.
// Sums are over k in grouped_gemm.cu's order.
// Needs: sm_90; at most 32 pairs, HIDDEN % 128 == 0, INTERMEDIATE % 64 == 0, `state` zero: the last to leave it leaves
// it so.
#include "expert_work.cuh"
#include "fragments.cuh"
#include "hopper.cuh"

#ifndef HIDDEN
#define HIDDEN 2048
#define INTERMEDIATE 768
#define NUM_EXPERTS 128
#define STAGES 12
#endif
#ifndef BULK
#define BULK 0
#endif
#ifndef FIRST_WARPS  // that begin with w13
#define FIRST_WARPS 6
#endif

constexpr int WARPS = 8, PIECE = 2048, MAPPED = 128;
constexpr int K_BLOCKS_1 = HIDDEN / 64, K_BLOCKS_2 = INTERMEDIATE / 64;
constexpr int GROUPS_1 = INTERMEDIATE / 8, GROUPS_2 = HIDDEN / 16;  // of an expert
static_assert(STAGES <= K_BLOCKS_1 && STAGES <= K_BLOCKS_2,
              "thin_experts.cu: loads reach into the next group, no farther");

struct State {
  u32 claimed[2], left, unused, ready[32];  // ready: of each local pair, groups of h that are there
};

struct Group {
  const u8* from;
  int entry, number, second, k_blocks;  // of the local pairs; k_blocks 0: none
};

extern __shared__ __align__(1024) u8 rings[];  // [WARPS][STAGES][16 rows][128 B, swizzled]
__shared__ uint4 x_row[HIDDEN / 8], h_row[WARPS][INTERMEDIATE / 8];
__shared__ u32 left_warps;
#if BULK
__shared__ u64 full[WARPS][STAGES];
#endif

struct Stream {  // a warp's ring
  u32 base, from_lane;
  int lane, loading = 0, slot = 0;
  u32 parity = 0;
#if BULK
  u32 barriers;
  u64 policy;
#endif

  __device__ __forceinline__ Stream(int warp, int lane)
      : base(shared_address(rings) + warp * STAGES * PIECE), lane(lane) {
    // Lane l names row l & 15 and, of two pieces, piece l / 16.
    from_lane = base + (lane & 15) * 128;
#if BULK
    barriers = shared_address(full[warp]);
    policy = evict_first_policy();
    if (lane == 0) {
      for (int i = 0; i < STAGES; ++i) barrier_init(barriers + i * 8, 1);
      barriers_visible();
    }
    __syncwarp();
#endif
  }

  __device__ __forceinline__ void load(const u8* from) {
    const u32 to = base + loading * PIECE;
#if BULK
    if (elect_one()) {
      barrier_arrive_expect(barriers + loading * 8, PIECE);
      bulk_load_once(to, from, PIECE, barriers + loading * 8, policy);
    }
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) copy_16_or_zeros(to + i * 512 + lane * 16, from + i * 512 + lane * 16, true);
#endif
    if (++loading == STAGES) loading = 0;
  }
  __device__ __forceinline__ void loads_end() {
#if !BULK
    copies_commit();
#endif
  }

  __device__ __forceinline__ void wait() {
#if BULK
    barrier_wait(barriers + slot * 8, parity);
#else
    copies_wait<STAGES - 1>();
    __syncwarp();
#endif
  }

  // sums += the slot's 16 rows times 64 numbers of `row`, in column 0.
  __device__ __forceinline__ void multiply(const u32* row, float (&sums)[4]) {
    uint4 a[4];
    u32 b[8];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      a[k] = load_matrices(from_lane + slot * PIECE + (((k * 2 + (lane >> 4)) ^ (lane & 7)) << 4));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      b[i] = row[i * 4 + (lane & 3)];
      if (lane >= 4) b[i] = 0;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) mma_bf16(sums, a[k], b[k * 2], b[k * 2 + 1]);
    __syncwarp();
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
};

struct Pairs {
  int expert;  // local, of pair `lane`; -1 none
  u32 local;   // which pairs have one

  // By a whole warp.
  __device__ __forceinline__ int of_entry(int entry) const {
    const int lane = threadIdx.x & 31;
    return __ffs(__ballot_sync(0xffffffffu, expert >= 0 && __popc(local & ((1u << lane) - 1)) == entry)) - 1;
  }
};

// The group of a claim; `second`: of w2.
__device__ __forceinline__ Group group_of(u32 number, bool second, const Pairs& pairs, const u8* w13, const u8* w2) {
  const u32 each = second ? GROUPS_2 : GROUPS_1;
  Group group = {};
  if (number >= each * __popc(pairs.local)) return group;
  group.second = second, group.entry = number / each, group.number = number % each;
  group.k_blocks = second ? K_BLOCKS_2 : K_BLOCKS_1;
  const int expert = __shfl_sync(0xffffffffu, pairs.expert, pairs.of_entry(group.entry));
  const i64 block = (i64)expert * (each * 16 / 128) + group.number / 8;
  group.from = (second ? w2 : w13) + block * group.k_blocks * 16384 + group.number % 8 * PIECE;
  return group;
}

// An increment up to a limit: to an addition the assembler adds votes, and so waits for its answer here, not where it
// is looked at.
__device__ __forceinline__ u32 claim_one(State* state, bool second, int lane) {
  u32 number = 0;
  if (lane == 0)
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0x7fffffff;"
                 : "=r"(number)
                 : "l"(state->claimed + second)
                 : "memory");
  return number;
}

// By a warp that will neither claim nor wait again.
__device__ __forceinline__ void leave(State* state, int lane) {
  if (lane || atomicAdd(&left_warps, 1u) != WARPS - 1) return;
  if (add_acquire_release(&state->left, 1) != gridDim.x - 1) return;
  state->claimed[0] = state->claimed[1] = state->left = 0;
  for (int i = 0; i < 32; ++i) state->ready[i] = 0;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    thin_experts(const u8* w13, const u8* w2, const u16* x, const int* ids, int num_pairs, const int* expert_map,
                 int num_mapped, u16* h, u16* y, State* state, Work* work, u64* expert_rows) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  Stream stream(warp, lane);
  if (threadIdx.x == 0) left_warps = 0;
  allow_next_kernel();
  wait_for_previous_kernel();

  bool second = warp >= FIRST_WARPS;
  u32 claim = claim_one(state, second, lane);
  Pairs pairs;
  pairs.expert = lane < num_pairs ? ids[lane] : -1;
  int mapped[MAPPED / 32];  // the expert map's beginning, asked for beside the ids
#pragma unroll
  for (int i = 0; i < MAPPED / 32; ++i)
    mapped[i] = expert_map && i * 32 + lane < num_mapped ? expert_map[i * 32 + lane] : -1;
  constexpr int EACH = (HIDDEN / 8 + WARPS * 32 - 1) / (WARPS * 32);
  uint4 piece[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = i * WARPS * 32 + threadIdx.x;
    if (at < HIDDEN / 8) piece[i] = ((const uint4*)x)[at];
  }
  if (expert_map) {
    const int id = pairs.expert;
    pairs.expert = id >= MAPPED && id < num_mapped ? expert_map[id] : -1;
#pragma unroll
    for (int i = 0; i < MAPPED / 32; ++i) {
      const int local = __shfl_sync(0xffffffffu, mapped[i], id & 31);
      if (id >> 5 == i) pairs.expert = local;
    }
  }
  if ((u32)pairs.expert >= (u32)NUM_EXPERTS) pairs.expert = -1;
  pairs.local = __ballot_sync(0xffffffffu, pairs.expert >= 0);

  claim = __shfl_sync(0xffffffffu, claim, 0);
  const bool notes = !second && claim == 0;  // one warp
  Group now = group_of(claim, second, pairs, w13, w2);
  if (!now.k_blocks && !second) {
    second = true;
    claim = claim_one(state, true, lane);
    now = group_of(__shfl_sync(0xffffffffu, claim, 0), true, pairs, w13, w2);
  }
#pragma unroll 1
  for (int i = 0; i < STAGES; ++i) {
    if (now.k_blocks) stream.load(now.from + i * 16384);
    stream.loads_end();
  }
  if (notes) {
    if (work && lane == 0) {
      const u64 began = now_ns();
      const Work last = {__ldcg(&work->busy_ns), __ldcg(&work->began), __ldcg(&work->ended)};
      if (last.ended > last.began) work->busy_ns = last.busy_ns + (last.ended - last.began);
      work->began = pairs.local ? began : NO_PAIRS;
    }
    if (expert_rows && pairs.expert >= 0) count_rows(expert_rows + pairs.expert, 1);
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = i * WARPS * 32 + threadIdx.x;
    if (at < HIDDEN / 8) x_row[at] = piece[i];
  }
  __syncthreads();  // x_row, left_warps
  if (!now.k_blocks) return leave(state, lane);

  while (true) {
    claim = claim_one(state, second, lane);  // looked at when this group's loads are all under way
    Group next = {};
    bool known = false;
    const u32* row = (const u32*)x_row;
    const int pair = pairs.of_entry(now.entry);
    u16* const h_of_pair = h + (i64)pair * INTERMEDIATE;
    if (now.second) {
      if (lane == 0)
        while (load_acquire(state->ready + now.entry) < GROUPS_1) __nanosleep(32);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < (INTERMEDIATE / 8 + 31) / 32; ++i)
        if (i * 32 + lane < INTERMEDIATE / 8)
          h_row[warp][i * 32 + lane] = __ldcg((const uint4*)h_of_pair + i * 32 + lane);
      __syncwarp();
      row = (const u32*)h_row[warp];
    }
    float sums[4] = {};
    int loaded = STAGES;  // k-blocks of this group, or with `known` of the next
#pragma unroll 1
    for (int kb = 0; kb < now.k_blocks; ++kb) {
      stream.wait();
      stream.multiply(row + kb * 32, sums);
      const bool over = kb == now.k_blocks / 2 || loaded == now.k_blocks;
      if (!known && !second && over && __shfl_sync(0xffffffffu, claim, 0) >= GROUPS_1 * __popc(pairs.local)) {
        second = true;  // nothing of w13 is left
        claim = claim_one(state, true, lane);
      }
      if (!known && loaded == now.k_blocks) {
        next = group_of(__shfl_sync(0xffffffffu, claim, 0), second, pairs, w13, w2);
        known = true, loaded = 0;
        if (!next.k_blocks) leave(state, lane);
      }
      if (!known || next.k_blocks) stream.load((known ? next.from : now.from) + (i64)loaded++ * 16384);
      stream.loads_end();
    }
    // Column 0 is in the lanes that are multiples of 4: rows lane / 4 and 8 more.
    if (now.second) {
      const float low = __shfl_sync(0xffffffffu, sums[0], lane * 8 & 31),
                  high = __shfl_sync(0xffffffffu, sums[2], lane * 8 & 31);
      const float low_1 = __shfl_sync(0xffffffffu, sums[0], (lane * 8 + 4) & 31);
      const float high_1 = __shfl_sync(0xffffffffu, sums[2], (lane * 8 + 4) & 31);
      u32* const to = (u32*)(y + (i64)pair * HIDDEN + now.number * 16);
      if (lane < 8) to[lane] = lane < 4 ? pack_bf16(low, low_1) : pack_bf16(high, high_1);
    } else {
      const float value = silu(sums[0]) * sums[2];
      const float low = __shfl_sync(0xffffffffu, value, lane * 8 & 31);
      const float high = __shfl_sync(0xffffffffu, value, (lane * 8 + 4) & 31);
      if (lane < 4) ((u32*)(h_of_pair + now.number * 8))[lane] = pack_bf16(low, high);
      __syncwarp();
      if (lane == 0) add_release(state->ready + now.entry, 1);
    }
    if (!next.k_blocks) break;
    now = next;
  }
  if (lane == 0) end_product(work);
}
