// peer_exchange.cu: rows of tokens to their experts' GPUs and back, written straight into the peers' memory.
// begin:    once a step.  Writes the step's facts for the kernels behind it; an owner of experts grants every source of
//           the step to write here: what stood in its buffers has been read.
// dispatch: each token's row once to every owner that needs it, rows[source][token], and its local slots there, -1
// none. answer:   every computed row (row, k) with a slot to its source, y[token][k]. A warp moves pieces of 2 KiB.
// Signals are system-scope counters: every block of a kernel adds its part of SIGNAL with a system release, so a turn
// is whole when SIGNAL more are there, whatever the grid.  Block 0 then waits for the counters of this rank.  What is
// expected is counted in device memory, so a CUDA graph replays. Every wait ends: by the counter, a deadline on
// %globaltimer, or `poison`, which who gives up writes to all.  After a wait that did not end well a rank signals no
// more: who comes late must not take what was left undone for rows and answers, but wait, and find the poison.
// Needs: HIDDEN * element size % 16 == 0, TOP_K <= 32, at most 64 sources and 64 owners.
#include "exchange_rows.cuh"

#ifndef NUM_SOURCES
#define NUM_SOURCES 2
#endif
#ifndef NUM_OWNERS
#define NUM_OWNERS 2
#endif
// 1: the next kernel may become resident while this one waits for peers.  Only where no peer needs this GPU's
// multiprocessors, that is where every rank has a GPU of its own.
#ifndef EARLY_NEXT
#define EARLY_NEXT 0
#endif

constexpr int WARPS = 8;
constexpr u32 SIGNAL = 1024;  // most blocks that may signal
constexpr u64 NONE = ~0ull;
enum Wait { CREDIT, ARRIVAL, ANSWER };
enum Reason { LATE = 1, POISONED = 2 };

struct Control {     // one a rank, first in its buffer; offsets are known to router/peer_layout.py
  u32 arrived[64];   // by sources
  u32 answered[64];  // by owners
  u32 credit[64];    // by owners
  u32 poison;        // by anybody: 1 + the rank that is missing
  u32 unused0[63];
  u64 bad_return[64];  // by owners: layer << 40 | token << 8 | k of the first row that is not finite
  u64 error;           // layer << 32 | wait << 24 | reason << 16 | rank; the first wait that did not end well
  u64 bad_dispatch;    // layer << 40 | token << 8 of own tokens
  u64 unused1[14];
  u32 expected_arrivals[64], expected_answers[64], expected_credit[64];
  u64 sources;  // bit by source index: named in this step
  u64 timeout_ns;
  u32 key_shift;  // of the choice among copies
};

struct Mesh {  // everybody's addresses as this rank sees them
  Control* own;
  Control* owner[NUM_OWNERS];
  Control* source[NUM_SOURCES];
  u8* rows[NUM_OWNERS];    // [NUM_SOURCES * stride][ROW_BYTES]
  int* slots[NUM_OWNERS];  // [NUM_SOURCES * stride][TOP_K]
  u8* y[NUM_SOURCES];      // [stride][TOP_K][ROW_BYTES]
  int owner_rank[NUM_OWNERS], source_rank[NUM_SOURCES];
  int own_owner, own_source;  // index, -1 = not one
};

__device__ __forceinline__ u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u32 load_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed(u32* p, u32 v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// What all threads of the block wrote before a barrier is there for who reads the sum with load_acquire: a release is
// cumulative, so it is all the fence that is needed (one of its own beside it would be paid twice).
__device__ __forceinline__ void add_release(u32* p, u32 v) {
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void min_relaxed(u64* p, u64 v) {
  asm volatile("red.relaxed.sys.global.min.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ u64 now_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
__device__ __forceinline__ bool is_named(const Mesh& mesh, int source) { return mesh.own->sources >> source & 1; }
// No wait of a kernel before this one ended badly.
__device__ __forceinline__ bool is_live(const Mesh& mesh) { return mesh.own->error == NONE; }

// Waits until `counter` has reached `wanted`.  Where it does not end well all ranks are told, and the error names
// `rank`.
__device__ bool wait_for(const Mesh& mesh, const u32* counter, u32 wanted, int layer, Wait wait, int rank) {
  Control* own = mesh.own;
  u64 deadline = 0;
  for (u32 spins = 0; (int)(load_acquire(counter) - wanted) < 0; ++spins) {
    if (spins % 16) continue;
    const u64 now = now_ns();
    if (!deadline) deadline = now + own->timeout_ns;
    const u32 poison = load_relaxed(&own->poison);
    if (!poison && now < deadline) continue;
    const u64 reason = poison ? POISONED : LATE, missing = poison ? poison - 1 : rank;
    atomicCAS(&own->error, NONE, (u64)layer << 32 | (u64)wait << 24 | reason << 16 | missing);
    if (!poison) {
#pragma unroll 1
      for (int i = 0; i < NUM_OWNERS; ++i) store_relaxed(&mesh.owner[i]->poison, 1 + rank);
#pragma unroll 1
      for (int i = 0; i < NUM_SOURCES; ++i) store_relaxed(&mesh.source[i]->poison, 1 + rank);
    }
    return false;
  }
  return true;
}

// This block's part of a turn's signal.
__device__ __forceinline__ u32 my_part() { return blockIdx.x == 0 ? SIGNAL - (gridDim.x - 1) : 1; }

extern "C" __global__ void __launch_bounds__(64)
    begin(const __grid_constant__ Mesh mesh, u64 sources, u64 timeout_ns, u32 key_shift) {
  wait_for_previous_kernel();
  const int i = threadIdx.x;
  Control* own = mesh.own;
  own->bad_return[i] = NONE;
  if (i == 0)
    own->sources = sources, own->timeout_ns = timeout_ns, own->key_shift = key_shift, own->bad_dispatch = NONE;
  if (mesh.own_source >= 0 && sources >> mesh.own_source & 1 && i < NUM_OWNERS) own->expected_credit[i] += 1;
  if (mesh.own_owner >= 0 && i < NUM_SOURCES && sources >> i & 1 && is_live(mesh))
    add_release(&mesh.source[i]->credit[mesh.own_owner], 1);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    dispatch(const __grid_constant__ Mesh mesh, const u8* __restrict__ x, const int* __restrict__ topk_ids,
             const int* __restrict__ table, int num_logical, int num_tokens, int stride, int layer, int is_first) {
#if EARLY_NEXT
  allow_next_kernel();
#endif
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Control* own = mesh.own;
  if (mesh.own_source >= 0 && is_named(mesh, mesh.own_source) && is_live(mesh)) {
    bool granted = true;
    if (is_first && threadIdx.x < NUM_OWNERS)
      granted = wait_for(mesh, &own->credit[threadIdx.x], own->expected_credit[threadIdx.x], layer, CREDIT,
                         mesh.owner_rank[threadIdx.x]);
    if (is_first) granted = __syncthreads_and(granted);
    const i64 first_row = (i64)mesh.own_source * stride;
    const int num_units = granted ? stride * CHUNKS : 0;
    for (int unit = blockIdx.x * WARPS + warp; unit < num_units; unit += gridDim.x * WARPS) {
      const int token = unit / CHUNKS, chunk = unit % CHUNKS;
      uint4 piece[LOADS];
      Place place = {-1, -1};
      if (token < num_tokens) {
        const uint4* row = (const uint4*)(x + (i64)token * ROW_BYTES) + chunk * LOADS * 32 + lane;
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
          if (chunk * LOADS * 32 + i * 32 + lane < PIECES) piece[i] = __ldg(row + i * 32);
        const int id = lane < TOP_K ? __ldg(topk_ids + (i64)token * TOP_K + lane) : -1;
        place = place_of(table, num_logical, layer, own->key_shift, token, id);
      }
      const i64 to = first_row + token;
#pragma unroll 1
      for (int p = 0; p < NUM_OWNERS; ++p) {
        if (chunk == 0 && lane < TOP_K) mesh.slots[p][to * TOP_K + lane] = place.owner == p ? place.slot : -1;
        if (!__any_sync(0xffffffffu, place.owner == p)) continue;
        uint4* row = (uint4*)(mesh.rows[p] + to * ROW_BYTES) + chunk * LOADS * 32 + lane;
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
          if (chunk * LOADS * 32 + i * 32 + lane < PIECES) row[i * 32] = piece[i];
      }
      if (__any_sync(0xffffffffu, place.owner >= 0)) {
        bool sick = false;
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
          if (chunk * LOADS * 32 + i * 32 + lane < PIECES) sick |= has_non_finite(piece[i]);
        if (sick) min_relaxed(&own->bad_dispatch, (u64)layer << 40 | (u64)token << 8);
      }
    }
    __syncthreads();
    if (granted && threadIdx.x < NUM_OWNERS) add_release(&mesh.owner[threadIdx.x]->arrived[mesh.own_source], my_part());
  }
  if (blockIdx.x == 0 && mesh.own_owner >= 0) {
    for (int s = 0; s < NUM_SOURCES; ++s)
      if (!is_named(mesh, s))
        for (int i = threadIdx.x; i < stride * TOP_K; i += WARPS * 32)
          mesh.slots[mesh.own_owner][(i64)s * stride * TOP_K + i] = -1;
    const int s = threadIdx.x;
    if (s < NUM_SOURCES && is_named(mesh, s)) {
      const u32 wanted = own->expected_arrivals[s] += SIGNAL;
      wait_for(mesh, &own->arrived[s], wanted, layer, ARRIVAL, mesh.source_rank[s]);
    }
    __syncthreads();
  }
#if !EARLY_NEXT
  allow_next_kernel();
#endif
}

// Grid: (blocks, sources); sources beyond the grid are none of this rank's business (it owns no experts).
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    answer(const __grid_constant__ Mesh mesh, const u8* __restrict__ expert_rows, int stride, int layer) {
#if EARLY_NEXT
  allow_next_kernel();
#endif
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31, s = blockIdx.y;
  Control* own = mesh.own;
  if (mesh.own_owner >= 0 && is_named(mesh, s) && is_live(mesh)) {
    const int* slots = mesh.slots[mesh.own_owner] + (i64)s * stride * TOP_K;
    const u8* from = expert_rows + (i64)s * stride * TOP_K * ROW_BYTES;
    const int num_units = stride * TOP_K * CHUNKS, step = gridDim.x * WARPS;
    for (int first = blockIdx.x * WARPS + (threadIdx.x >> 5); first < num_units; first += 32 * step) {
      const int mine = first + lane * step;  // 32 units of this warp at a time: a lane looks at each
      const int slot = mine < num_units ? slots[mine / CHUNKS] : -1;
      u32 wanted = __ballot_sync(0xffffffffu, slot >= 0);
      while (wanted) {
        const int unit = first + (__ffs(wanted) - 1) * step, pair = unit / CHUNKS, chunk = unit % CHUNKS;
        wanted &= wanted - 1;
        const i64 at = (i64)pair * PIECES + chunk * LOADS * 32 + lane;
        uint4 piece[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
          if (chunk * LOADS * 32 + i * 32 + lane < PIECES) piece[i] = __ldg((const uint4*)from + at + i * 32);
        bool sick = false;
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
          if (chunk * LOADS * 32 + i * 32 + lane < PIECES) {
            ((uint4*)mesh.y[s])[at + i * 32] = piece[i];
            sick |= has_non_finite(piece[i]);
          }
        if (sick)
          min_relaxed(&mesh.source[s]->bad_return[mesh.own_owner],
                      (u64)layer << 40 | (u64)(pair / TOP_K) << 8 | (u64)(pair % TOP_K));
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) add_release(&mesh.source[s]->answered[mesh.own_owner], my_part());
  }
  if (blockIdx.x == 0 && s == 0 && mesh.own_source >= 0 && is_named(mesh, mesh.own_source)) {
    const int p = threadIdx.x;
    if (p < NUM_OWNERS) {
      const u32 wanted = own->expected_answers[p] += SIGNAL;
      wait_for(mesh, &own->answered[p], wanted, layer, ANSWER, mesh.owner_rank[p]);
    }
    __syncthreads();
  }
#if !EARLY_NEXT
  allow_next_kernel();
#endif
}
