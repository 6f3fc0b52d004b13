// nccl_pack.cu: what stands around the all-to-alls of router/exchange_nccl.py, one launch on each side of one.
// A message is a row and its slots side by side: ROW_BYTES | u32 pairs of this owner in earlier tokens | u16 slot x
// TOP_K, 0xffff none; whole 16 bytes. Padded form: message (owner, token) at token; exact: those that an owner needs.
// Answers of the padded form stand at their (token, k); bounded: close together, `bound` places a source and owner.
// Where is counted by source and owner from the pairs of each token, a byte each, which `pack` and `unpack` leave in
// [num][pitch]: to sum 2048 of them costs a warp four loads, a launch of its own would cost more.
// count:          exact: places[owner][token] = {its row, its first pair} among what goes to that owner; counts[owner]
//                 = {rows, pairs}. One CTA an owner, so that no order depends on timing.
// pack:           ids -> owners and slots; rows into the messages of who needs them, own ones straight to their place.
// unpack:         messages -> rows [R][HIDDEN] and slots [R][TOP_K] int32; slots that are not there become -1.
// pack_answers:   exact: computed rows of pairs with a slot, close together, by source.
// pack_bounded:   bounded: the same, as many as there are places.
// unpack_answers: y[token][k] from whoever made it, own ones straight from the computed rows.
// Own rows never go through NCCL. Grid: a warp a unit of 2 KiB, so that few rows use many multiprocessors.
// facts (int64): the choice among copies, slots of this rank, then first rows by layer << 40 | token << 8 | k: without
// a place among the bounded answers, not finite of own tokens, not finite of what each owner made. Needs: HIDDEN *
// element size % 16 == 0, TOP_K <= 32, at most 64 sources.
#include "exchange_rows.cuh"

constexpr int WARPS = 4;
constexpr int MESSAGE_BYTES = ROW_BYTES + (4 + 2 * TOP_K + 15) / 16 * 16;
constexpr int KEY_SHIFT = 0, NUM_SLOTS = 1, NO_PLACE = 2, BAD_ROW = 3, BAD_ANSWER = 4;
constexpr u32 ALL = 0xffffffffu;

__device__ __forceinline__ void keep_first(i64* first, int layer, int token, int k) {
  const i64 key = (i64)layer << 40 | (i64)token << 8 | k;
  asm volatile("red.relaxed.gpu.global.min.s64 [%0], %1;" ::"l"(first), "l"(key) : "memory");
}

// Rows (or pairs) of the ranks before `end` but `own`, which sends itself nothing. All lanes of a warp.
__device__ __forceinline__ int rows_before(const int2* counts, int end, int own) {
  int sum = 0;
  for (int q = threadIdx.x & 31; q < end; q += 32) sum += q != own ? counts[q].x : 0;
  return __reduce_add_sync(ALL, sum);
}
__device__ __forceinline__ int pairs_before(const int2* counts, int end, int own) {
  int sum = 0;
  for (int q = threadIdx.x & 31; q < end; q += 32) sum += q != own ? counts[q].y : 0;
  return __reduce_add_sync(ALL, sum);
}

// Sum of the first `end` bytes at a multiple of 16. All lanes of a warp.
__device__ __forceinline__ int bytes_before(const u8* counts, int end) {
  u32 sum = 0;
  for (int first = (threadIdx.x & 31) * 16; first < end; first += 32 * 16) {
    const uint4 piece = __ldg((const uint4*)(counts + first));
    const u32 word[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int inside = end - first - 4 * i;
      sum = __dp4a(inside >= 4 ? word[i] : inside <= 0 ? 0u : word[i] & ((1u << 8 * inside) - 1), 0x01010101u, sum);
    }
  }
  return __reduce_add_sync(ALL, sum);
}

extern "C" __global__ void __launch_bounds__(1024)
    count(const int* __restrict__ ids, const int* __restrict__ table, const i64* facts, int2* places, int2* counts,
          int num_logical, int num_tokens, int layer, int num_owners, int own_owner, int own_source) {
  __shared__ u32 totals[32];
  allow_next_kernel();
  wait_for_previous_kernel();
  const int owner = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 key_shift = (u32)facts[KEY_SHIFT];
  int rows = 0, pairs = 0;  // of the tokens before this block of 1024
  for (int base = 0; base < num_tokens; base += 1024) {
    const int token = base + threadIdx.x;
    u32 mine = 0;
    if (token < num_tokens) {
#pragma unroll 8
      for (int k = 0; k < TOP_K; ++k)
        mine +=
            place_of(table, num_logical, layer, key_shift, token, __ldg(ids + (i64)token * TOP_K + k)).owner == owner;
      mine |= mine ? 1u << 20 : 0;  // rows above, pairs below: no sum of 1024 tokens overflows
    }
    u32 sum = mine;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const u32 other = __shfl_up_sync(ALL, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    const u32 total = totals[lane];
    const u32 before = __reduce_add_sync(ALL, lane < warp ? total : 0) + sum - mine;
    const u32 all = __reduce_add_sync(ALL, total);
    __syncthreads();
    if (token < num_tokens)
      places[(i64)owner * num_tokens + token] = make_int2(rows + (int)(before >> 20), pairs + (int)(before & 0xfffff));
    rows += all >> 20, pairs += all & 0xfffff;
  }
  if (threadIdx.x) return;
  counts[owner] = make_int2(rows, pairs);
  if (owner == own_owner) counts[num_owners + own_source] = make_int2(rows, pairs);
}

// `places` and `counts`: exact form, else null. `pairs` [owners][pitch]: bounded form, else null. Own rows begin at
// `own_begin` of `rows`.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    pack(const u8* __restrict__ x, const int* __restrict__ ids, const int* __restrict__ table, i64* facts,
         const int2* __restrict__ places, const int2* __restrict__ counts, u8* messages, u8* rows, int* slots,
         int* where, u8* pairs, int num_logical, int num_tokens, int stride, int layer, int num_owners, int own_owner,
         int own_begin, int pitch) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31;
  const u32 key_shift = (u32)facts[KEY_SHIFT];
  const int num_units = (places ? num_tokens : stride) * CHUNKS;
  for (int unit = blockIdx.x * WARPS + (threadIdx.x >> 5); unit < num_units; unit += gridDim.x * WARPS) {
    const int token = unit / CHUNKS, chunk = unit % CHUNKS;
    const bool exists = token < num_tokens;
    Unit row;
    Place place = {-1, -1};
    if (exists) {
      row.load(x + (i64)token * ROW_BYTES, chunk);
      if (lane < TOP_K) {
        const i64 pair = (i64)token * TOP_K + lane;
        place = place_of(table, num_logical, layer, key_shift, token, __ldg(ids + pair));
        if (chunk == 0) where[pair] = place.owner;
      }
    }
    i64 base = 0;  // of the owner's messages
#pragma unroll 1
    for (int p = 0; p < num_owners; ++p) {
      const bool is_here = place.owner == p, is_own = p == own_owner;
      const u32 here = __ballot_sync(ALL, is_here);
      const bool needed = here;
      if (pairs && exists && chunk == 0 && lane == 0) pairs[(i64)p * pitch + token] = __popc(here);
      int at = token, first_pair = 0;
      if (places && needed) {
        const int2 found = __ldg(places + (i64)p * num_tokens + token);
        at = found.x, first_pair = found.y;
      }
      const i64 to = (is_own ? own_begin : base) + at;
      if (!is_own) base += places ? __ldg(counts + p).x : stride;
      if (places && !needed) continue;
      if (chunk == 0 && is_own && lane < TOP_K) slots[to * TOP_K + lane] = is_here ? place.slot : -1;
      if (chunk == 0 && !is_own) {
        u8* meta = messages + to * MESSAGE_BYTES + ROW_BYTES;
        if (lane == 0) *(u32*)meta = first_pair;
        if (lane < TOP_K) ((u16*)(meta + 4))[lane] = is_here ? place.slot : 0xffff;
      }
      if (needed) row.store(is_own ? rows + to * ROW_BYTES : messages + to * MESSAGE_BYTES, chunk);
    }
    if (__any_sync(ALL, place.owner >= 0) && row.is_sick(chunk)) keep_first(facts + BAD_ROW, layer, token, 0);
  }
}

// Rows own_begin .. own_end are there already, and no message of them. `stride`: rows of a source in the padded form,
// where a source whose bit is not in `named` sent nothing; 0 = exact. `pairs` [sources][pitch]: bounded form, else
// null.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    unpack(const u8* __restrict__ messages, const i64* facts, u8* rows, int* slots, u8* pairs, int num_rows,
           int own_begin, int own_end, int stride, u64 named, int pitch) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31, num_units = num_rows * CHUNKS;
  const int num_slots = (int)facts[NUM_SLOTS];
  for (int unit = blockIdx.x * WARPS + (threadIdx.x >> 5); unit < num_units; unit += gridDim.x * WARPS) {
    const int to = unit / CHUNKS, chunk = unit % CHUNKS;
    if (to >= own_begin && to < own_end) continue;
    int slot = -1;
    Unit row;
    if (stride == 0 || named >> to / stride & 1) {
      const u8* message = messages + (i64)(to < own_begin ? to : to - (own_end - own_begin)) * MESSAGE_BYTES;
      row.load(message, chunk);
      if (lane < TOP_K) slot = ((const u16*)(message + ROW_BYTES + 4))[lane];
      if (slot >= num_slots) slot = -1;  // none, or whatever stands there after an abort
    }
    if (chunk == 0 && lane < TOP_K) slots[(i64)to * TOP_K + lane] = slot;
    const u32 wanted = __ballot_sync(ALL, slot >= 0);
    if (pairs && chunk == 0 && lane == 0) pairs[(i64)(to / stride) * pitch + to % stride] = __popc(wanted);
    if (wanted) row.store(rows + (i64)to * ROW_BYTES, chunk);
  }
}

// Grid: (blocks, sources). `counts` of the sources.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    pack_answers(const u8* __restrict__ expert_rows, const int* __restrict__ slots, const u8* __restrict__ messages,
                 const int2* __restrict__ counts, u8* answers, int own_source) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31, source = blockIdx.y;
  if (source == own_source) return;
  const int2 mine = counts[source];
  const int first_message = rows_before(counts, source, own_source);
  const int first_row = first_message + (own_source >= 0 && own_source < source ? counts[own_source].x : 0);
  u8* to = answers + (i64)pairs_before(counts, source, own_source) * ROW_BYTES;
  const int num_units = mine.x * CHUNKS;
  for (int unit = blockIdx.x * WARPS + (threadIdx.x >> 5); unit < num_units; unit += gridDim.x * WARPS) {
    const int row = unit / CHUNKS, chunk = unit % CHUNKS;
    const i64 first = (i64)(first_row + row) * TOP_K;
    const int slot = lane < TOP_K ? slots[first + lane] : -1;
    u32 pair = *(const u32*)(messages + (i64)(first_message + row) * MESSAGE_BYTES + ROW_BYTES);
    for (u32 left = __ballot_sync(ALL, slot >= 0); left; left &= left - 1, ++pair) {
      if (pair >= (u32)mine.y) break;  // whatever stands there after an abort
      Unit made;
      made.load(expert_rows + (first + __ffs(left) - 1) * ROW_BYTES, chunk);
      made.store(to + (i64)pair * ROW_BYTES, chunk);
    }
  }
}

// Grid: (blocks, sources). Pairs beyond the `bound` places stay away: their source knows it by itself.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 8)
    pack_bounded(const u8* __restrict__ expert_rows, const int* __restrict__ slots, const u8* __restrict__ pairs,
                 u8* answers, int own_source, int stride, int bound, u64 named, int pitch) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31, source = blockIdx.y;
  if (source == own_source || !(named >> source & 1)) return;
  const int remote = source - (own_source >= 0 && own_source < source);
  u8* to = answers + (i64)remote * bound * ROW_BYTES;
  const int num_units = stride * TOP_K * CHUNKS;
  for (int unit = blockIdx.x * WARPS + (threadIdx.x >> 5); unit < num_units; unit += gridDim.x * WARPS) {
    const int pair = unit / CHUNKS, chunk = unit % CHUNKS, row = pair / TOP_K, k = pair % TOP_K;
    const i64 first = ((i64)source * stride + row) * TOP_K;
    const u32 wanted = __ballot_sync(ALL, lane < TOP_K && __ldg(slots + first + lane) >= 0);
    if (!(wanted >> k & 1)) continue;
    Unit made;
    made.load(expert_rows + (first + k) * ROW_BYTES, chunk);
    const int place = bytes_before(pairs + (i64)source * pitch, row) + __popc(wanted & ((1u << k) - 1));
    if (place < bound) made.store(to + (i64)place * ROW_BYTES, chunk);
  }
}

// `places` and `counts` (of the owners): exact form, else null. `pairs` [owners][pitch] and `bound`: bounded form, else
// null; a pair without a place becomes zeros, and is told.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 10)
    unpack_answers(const u8* __restrict__ expert_rows, const u8* __restrict__ answers, const int* __restrict__ where,
                   i64* facts, const int2* __restrict__ places, const int2* __restrict__ counts,
                   const u8* __restrict__ pairs, u8* y, int num_tokens, int stride, int layer, int own_owner,
                   int own_begin, int bound, int pitch) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = threadIdx.x & 31, num_units = num_tokens * TOP_K * CHUNKS;
  for (int unit = blockIdx.x * WARPS + (threadIdx.x >> 5); unit < num_units; unit += gridDim.x * WARPS) {
    const int pair = unit / CHUNKS, chunk = unit % CHUNKS, token = pair / TOP_K, k = pair % TOP_K;
    const int lane_owner = lane < TOP_K ? __ldg(where + token * TOP_K + lane) : -1;
    const int owner = __shfl_sync(ALL, lane_owner, k);
    if (owner < 0) continue;
    int2 place = make_int2(token, 0);
    if (places) place = __ldg(places + (i64)owner * num_tokens + token);
    const u8* from = expert_rows + ((i64)(own_begin + place.x) * TOP_K + k) * ROW_BYTES;
    bool has_place = true;
    if (owner != own_owner) {
      const int earlier = __popc(__ballot_sync(ALL, lane_owner == owner && lane < k));
      const int remote = owner - (own_owner >= 0 && own_owner < owner);
      i64 at = ((i64)remote * stride + token) * TOP_K + k;
      if (places) at = (i64)pairs_before(counts, owner, own_owner) + place.y + earlier;
      if (pairs) {
        const int mine = bytes_before(pairs + (i64)owner * pitch, token) + earlier;
        at = (i64)remote * bound + mine;
        has_place = mine < bound;
      }
      from = answers + at * ROW_BYTES;
    }
    Unit made;
    if (has_place) {
      made.load(from, chunk);
    } else {
      made.clear();
      if (chunk == 0 && lane == 0) keep_first(facts + NO_PLACE, layer, token, k);
    }
    made.store(y + (i64)pair * ROW_BYTES, chunk);
    if (made.is_sick(chunk)) keep_first(facts + BAD_ANSWER + owner, layer, token, k);
  }
}
