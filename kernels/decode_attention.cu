// decode_attention.cu: the one new token of each request, from q, k and v as their product leaves them to mixed heads:
// norms and rotation as qk_norm_rope.cu, k and v into the cache, o = softmax(scale * q k^T) v over the pages of the
// sequence; bf16 in and out, float32 sums. One launch in place of two, for contexts that are not long.
// Grid: (CTAS * NUM_KV_HEADS, requests), a cluster of CTAS CTAs for a KV head of a request, WARPS warps each. The
//   sequence is dealt out in units of 16 positions, from the last one down, first one to each CTA, then to their next
//   warps; so the new position is always in the first unit of warp 0 of CTA 0, which is given k and v by the norms.
// A warp brings its units to a ring of its own and is the only one to read them. All positions but the new one, their
//   page numbers and lengths were written by earlier steps or sent by the plan's copy, and a copy on the stream is no
//   programmatic launch: when a step's first kernel starts everything before is done. So the first STAGES units of each
//   warp are on their way before the kernel that makes qkv has ended.
// Scores are K (16 positions) by q (8 heads as columns), so that 8 heads waste nothing; weights are transposed in
//   registers into the second operand of V^T by weights. Warps add up in shared memory; each CTA finishes a slice of
//   the columns, and gets the others' sums of it by st.async, which tell their bytes to its barrier.
// What a request computes depends on it alone; rows with slot < 0 are padding: zeros out, nothing written.
// KV_FP8: the caches hold e4m3 numbers, widened on their way from shared memory to fragments: four columns that a lane
//   has of a row in a row are two pairs of an operand, with q's columns in that order; a transposed word holds two
//   neighbouring columns of two positions, which are rows of V^T eight apart.
// Needs: HEAD_DIM 64 or 128, up to 16 heads a KV head, CTAS of 1, 2, 4 or 8; sm_90 or newer.
#include "e4m3.cuh"
#include "fragments.cuh"
#include "hopper.cuh"
#include "qk_norm_rope.cuh"

#ifndef NUM_HEADS
#define NUM_HEADS 32
#define NUM_KV_HEADS 4
#endif
#ifndef PAGE
#define PAGE 16
#endif
#ifndef CTAS
#define CTAS 8
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef STAGES
#define STAGES 2
#endif

constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS, TILES = (GROUP + 7) / 8, ROWS = TILES * 8;  // heads of a KV head
constexpr int ALL = NUM_HEADS + 2 * NUM_KV_HEADS, THREADS = WARPS * 32;
constexpr int UNIT = 16, STEPS = HEAD_DIM / 16, COLUMNS = HEAD_DIM / CTAS;
constexpr int ROW_BYTES = HEAD_DIM * 2, KV_BYTES = HEAD_DIM * sizeof(Kv), PIECES = KV_BYTES / 16;  // of q; of k and v
constexpr int V_OF_UNIT = UNIT * KV_BYTES, UNIT_BYTES = 2 * V_OF_UNIT;                             // K, then V
constexpr int RING_BYTES = STAGES * UNIT_BYTES, PITCH = HEAD_DIM + 4;  // sums lie in the ring, no bank twice
constexpr int A_PASS = THREADS / LANES, PASSES = (GROUP + 2 + A_PASS - 1) / A_PASS;  // heads normed at a time
constexpr int Q = WARPS * RING_BYTES, STATS = Q + ROWS * ROW_BYTES, GATHERED = STATS + WARPS * ROWS * 8;
constexpr int GATHERED_STATS = GATHERED + GROUP * HEAD_DIM * 4, BARRIER = GATHERED_STATS + CTAS * ROWS * 8;
constexpr int SHARED_BYTES = BARRIER + 16;
constexpr u32 BYTES_OF_CTA = GROUP * COLUMNS * 4 + ROWS * 8;  // that one CTA sends another
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "decode_attention.cu: HEAD_DIM");
static_assert(NUM_HEADS % NUM_KV_HEADS == 0 && GROUP <= 16, "decode_attention.cu: NUM_HEADS");
#ifdef SHARED
static_assert(SHARED_BYTES == SHARED, "as in decode_attention.py");
#endif
static_assert(8 % CTAS == 0 && ROWS * PITCH * 4 <= RING_BYTES, "decode_attention.cu: CTAS or STAGES");

extern __shared__ __align__(128) u8 ring_memory[];

// 16-byte pieces of 8 rows at the same column lie in different banks.
template <int BYTES>
__device__ __forceinline__ u32 piece_at(u32 base, int row, int piece) {
  return base + row * BYTES + ((piece ^ (BYTES == 64 ? row >> 1 & 3 : row & 7)) << 4);
}
__device__ __forceinline__ u32 q_at(u32 base, int row, int piece) { return piece_at<ROW_BYTES>(base, row, piece); }
__device__ __forceinline__ u32 kv_at(u32 base, int row, int piece) { return piece_at<KV_BYTES>(base, row, piece); }

// What a CTA knows of its request.
struct Request {
  int length, num_units;  // positions with the new one
  const int* pages;
  const Kv *keys, *values;  // of the KV head

  // Of lane l the row in the caches of position l & 15 of a unit.
  __device__ __forceinline__ int place(int unit, int lane) const {
    const int position = min(unit * UNIT + (lane & 15), length - 1);
    return pages[position / PAGE] * PAGE + position % PAGE;
  }
  // A unit on its way to shared memory. Of what may be the LAST not the new position, and zeros beyond it, since no
  // weight cancels a NaN.
  template <bool LAST>
  __device__ __forceinline__ void load(u32 to, int unit, int place, int lane) const {
#pragma unroll
    for (int i = 0; i < UNIT * PIECES / 32; ++i) {
      const int row = (i * 32 + lane) / PIECES, piece = lane % PIECES, position = unit * UNIT + row;
      const i64 at =
          (i64)__shfl_sync(0xffffffffu, place, row) * (NUM_KV_HEADS * HEAD_DIM) + piece * (16 / (int)sizeof(Kv));
      if (LAST && position == length - 1) continue;
      copy_16_or_zeros(kv_at(to, row, piece), keys + at, !LAST || position < length);
      copy_16_or_zeros(kv_at(to + V_OF_UNIT, row, piece), values + at, !LAST || position < length);
    }
  }
};

// 16 positions of K, 16 columns a step, as the first operand.
__device__ __forceinline__ void load_keys(uint4 (&k)[STEPS], u32 from, int lane) {
  const int row = lane & 15, half = lane >> 4;
#pragma unroll
  for (int step = 0; step < STEPS; step += KV_FP8 + 1) {
    if (!KV_FP8) k[step] = load_matrices(kv_at(from, row, 2 * step + half));
    if (!KV_FP8) continue;
    const uint4 words = load_matrices(kv_at(from, row, step + half));
    widen_e4m3(k[step].x, k[step].z, words.x), widen_e4m3(k[step].y, k[step].w, words.y);
    widen_e4m3(k[step + 1].x, k[step + 1].z, words.z), widen_e4m3(k[step + 1].y, k[step + 1].w, words.w);
  }
}

// 16 positions of V transposed, 16 columns a step, as the first operand.
__device__ __forceinline__ void load_values(uint4 (&v)[STEPS], u32 from, int lane) {
  const int half = lane >> 4;
#pragma unroll
  for (int step = 0; step < STEPS; step += KV_FP8 + 1) {
    if (!KV_FP8) v[step] = load_transposed(kv_at(from, (lane & 7) + half * 8, 2 * step + (lane >> 3 & 1)));
    if (!KV_FP8) continue;
    const uint4 words = load_transposed(kv_at(from, lane & 15, step + half));
    v[step] = make_uint4(widen_upper_e4m3(words.x << 8), widen_upper_e4m3(words.x), widen_upper_e4m3(words.y << 8),
                         widen_upper_e4m3(words.y));
    v[step + 1] = make_uint4(widen_upper_e4m3(words.z << 8), widen_upper_e4m3(words.z), widen_upper_e4m3(words.w << 8),
                             widen_upper_e4m3(words.w));
  }
}
// Of a lane's rows g and g + 8 of a step the columns of V.
__device__ __forceinline__ int column_of(int step, int g, int upper) {
  return step * 16 + (KV_FP8 ? 2 * g + upper : g + upper * 8);
}

// Heads as the second operand: [tile][step][half of the step's columns].
struct Queries {
  u32 b[TILES][STEPS][2];

  __device__ __forceinline__ void load(u32 memory, int lane) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int step = 0; step < STEPS; step += KV_FP8 ? 1 : 2) {
        if (KV_FP8) {
          const u32 at = q_at(Q, tile * 8 + (lane >> 2), 2 * step + (lane >> 1 & 1)) + (lane & 1) * 8;
          const uint2 v = *(const uint2*)(ring_memory + at);
          b[tile][step][0] = v.x, b[tile][step][1] = v.y;
          continue;
        }
        const uint4 v = load_matrices(q_at(memory + Q, tile * 8 + (lane & 7), 2 * step + (lane >> 3)));
        b[tile][step][0] = v.x, b[tile][step][1] = v.y, b[tile][step + 1][0] = v.z, b[tile][step + 1][1] = v.w;
      }
  }
};

// A warp's part of the answer. A lane has heads tile * 8 + 2 * (lane & 3) + (i & 1) and columns column_of(step, lane /
// 4, i / 2); of the sums of weights its own positions' share.
struct Sums {
  float o[STEPS][TILES][4], peak[TILES][2], total[TILES][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      peak[tile][0] = peak[tile][1] = __int_as_float(0xff800000), total[tile][0] = total[tile][1] = 0.0f;
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[step][tile][i] = 0.0f;
    }
  }

  // `scale`: of scores, for powers of 2.
  __device__ __forceinline__ void add(u32 unit_at, int unit, int length, const Queries& q, float scale, int lane) {
    float s[2][TILES][4] = {};
    uint4 k[STEPS], v[STEPS];  // loads in a row, and those of V before anything depends on scores
    load_keys(k, unit_at, lane);
    load_values(v, unit_at + V_OF_UNIT, lane);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        mma_bf16(s[step & 1][tile], k[step], q.b[tile][step][0], q.b[tile][step][1]);
    u32 weights[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
      weigh(s[0][tile], s[1][tile], tile, unit, length, scale, lane, weights[tile]);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) mma_bf16(o[step][tile], v[step], weights[tile][0], weights[tile][1]);
  }

  // Scores s + more of 16 positions by 8 heads -> weights of both halves as second operands; what is there is rescaled.
  __device__ __forceinline__ void weigh(float (&s)[4], const float (&more)[4], int tile, int unit, int length,
                                        float scale, int lane, u32 (&weights)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] += more[i];
      if (unit * UNIT + (lane >> 2) + i / 2 * 8 >= length) s[i] = __int_as_float(0xff800000);
    }
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      float highest = fmaxf(s[head], s[head + 2]);
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, d));
      highest = fmaxf(highest, peak[tile][head]);
      const float factor = exp2_fast((peak[tile][head] - highest) * scale);
      peak[tile][head] = highest;
      s[head] = exp2_fast((s[head] - highest) * scale), s[head + 2] = exp2_fast((s[head + 2] - highest) * scale);
      total[tile][head] = __fmaf_rn(total[tile][head], factor, s[head] + s[head + 2]);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) o[step][tile][head] *= factor, o[step][tile][head + 2] *= factor;
    }
    weights[0] = transpose_8x8(pack_bf16(s[0], s[1])), weights[1] = transpose_8x8(pack_bf16(s[2], s[3]));
  }

  // To shared memory: o as [ROWS][PITCH], (peak, total) a head.
  __device__ __forceinline__ void store(float* to, float2* stats, int lane) {
    const int g = lane >> 2;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int head = tile * 8 + (lane & 3) * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int d = 4; d < 32; d <<= 1) total[tile][i] += __shfl_xor_sync(0xffffffffu, total[tile][i], d);
        if (g == 0) stats[head + i] = make_float2(peak[tile][i], total[tile][i]);
      }
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[(head + (i & 1)) * PITCH + column_of(step, g, i / 2)] = o[step][tile][i];
    }
  }
};

// Peak and total of `count` parts of a head, `stride` apart; factor[i] is what part i counts for.
template <int MOST>
__device__ __forceinline__ float2 join(const float2* stats, int stride, int count, float scale, float (&factor)[MOST]) {
  float peak = __int_as_float(0xff800000), total = 0.0f;
  float2 part[MOST];
#pragma unroll
  for (int i = 0; i < MOST; ++i)
    if (i < count) part[i] = stats[i * stride], peak = fmaxf(peak, part[i].x);
#pragma unroll
  for (int i = 0; i < MOST; ++i)
    if (i < count) factor[i] = exp2_fast((part[i].x - peak) * scale), total = __fmaf_rn(factor[i], part[i].y, total);
  return make_float2(peak, total);
}

// This CTA's sums to the CTAs that finish their columns.
__device__ __forceinline__ void send(u32 memory, int num_warps, u32 rank, float scale) {
  const float2* stats = (const float2*)(ring_memory + STATS);
  float factor[WARPS];
  constexpr int COUNT = GROUP * HEAD_DIM / 4;
#pragma unroll
  for (int turn = 0; turn < (COUNT + THREADS - 1) / THREADS; ++turn) {
    const int i = turn * THREADS + threadIdx.x;
    if (COUNT % THREADS && i >= COUNT) break;
    const int head = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4, to = column / COLUMNS;
    join(stats + head, ROWS, num_warps, scale, factor);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      if (w >= num_warps) continue;
      const float4 v = *(const float4*)(ring_memory + w * RING_BYTES + (head * PITCH + column) * 4);
      sum.x = __fmaf_rn(factor[w], v.x, sum.x), sum.y = __fmaf_rn(factor[w], v.y, sum.y);
      sum.z = __fmaf_rn(factor[w], v.z, sum.z), sum.w = __fmaf_rn(factor[w], v.w, sum.w);
    }
    const u32 at = memory + GATHERED + ((rank * GROUP + head) * COLUMNS + column % COLUMNS) * 4;
    store_cluster_async(in_cluster(at, to), __float_as_int(sum.x), __float_as_int(sum.y), __float_as_int(sum.z),
                        __float_as_int(sum.w), in_cluster(memory + BARRIER, to));
  }
  for (int i = threadIdx.x; i < CTAS * ROWS / 2; i += THREADS) {
    const int head = i % (ROWS / 2) * 2, to = i / (ROWS / 2);
    const float2 a = join(stats + head, ROWS, num_warps, scale, factor);
    const float2 b = join(stats + head + 1, ROWS, num_warps, scale, factor);
    store_cluster_async(in_cluster(memory + GATHERED_STATS + (rank * ROWS + head) * 8, to), __float_as_int(a.x),
                        __float_as_int(a.y), __float_as_int(b.x), __float_as_int(b.y),
                        in_cluster(memory + BARRIER, to));
  }
}

// This CTA's columns of all heads from what `num_ctas` CTAs sent; none: zeros.
__device__ __forceinline__ void finish(u16* out, int num_ctas, float scale) {
  const float2* stats = (const float2*)(ring_memory + GATHERED_STATS);
  const float* gathered = (const float*)(ring_memory + GATHERED);
  for (int i = threadIdx.x; i < GROUP * COLUMNS / 2; i += THREADS) {
    const int head = i / (COLUMNS / 2), column = i % (COLUMNS / 2) * 2;
    float factor[CTAS], x = 0.0f, y = 0.0f;
    const float total = join(stats + head, ROWS, num_ctas, scale, factor).y;
#pragma unroll
    for (int from = 0; from < CTAS; ++from) {
      if (from >= num_ctas) continue;
      const float2 v = *(const float2*)(gathered + (from * GROUP + head) * COLUMNS + column);
      x = __fmaf_rn(factor[from], v.x, x), y = __fmaf_rn(factor[from], v.y, y);
    }
    if (num_ctas) x = __fdividef(x, total), y = __fdividef(y, total);
    *(u32*)(out + head * HEAD_DIM + column) = pack_bf16(x, y);
  }
}

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(THREADS)
    decode_attention(const u16* qkv, const u16* qk_norm, float eps, const float* cos_sin, const i64* positions,
                     const i64* slot_mapping, Kv* k_cache, Kv* v_cache, const int* kv_lens, const int* page_starts,
                     const int* pages, float scale_of_scores, u16* out) {
  allow_next_kernel();
  const float scale = scale_of_scores * 1.44269504f;  // for powers of 2
  const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const int kv_head = blockIdx.x / CTAS;
  const int lane_of_head = threadIdx.x % LANES, first_head = threadIdx.x / LANES;
  const u32 rank = cluster_rank(), memory = shared_address(ring_memory), ring = memory + warp * RING_BYTES;
  const i64 token = blockIdx.y, position = positions[token], slot = slot_mapping[token];
  const int length = slot < 0 ? 0 : kv_lens[token], num_units = (length + UNIT - 1) / UNIT;
  const Request request = {length, num_units, pages + page_starts[token], k_cache + kv_head * HEAD_DIM,
                           v_cache + kv_head * HEAD_DIM};
  if (threadIdx.x == 0) barrier_init(memory + BARRIER, 1), barriers_visible();
#if EVERY_LANE_ARRIVES  // racecheck takes what one thread does to one barrier for a race
  __syncthreads();
#endif
  if (threadIdx.x == 0) barrier_arrive_expect(memory + BARRIER, min(CTAS, num_units) * BYTES_OF_CTA);
  cluster_arrive();
  const int first = num_units - 1 - (warp * CTAS + (int)rank);  // then down by CTAS * WARPS
  int place[STAGES];
#pragma unroll
  for (int stage = 0, unit = first; stage < STAGES; ++stage, unit -= CTAS * WARPS)
    place[stage] = unit >= 0 ? request.place(unit, lane) : 0;
#pragma unroll
  for (int stage = 0, unit = first; stage < STAGES; ++stage, unit -= CTAS * WARPS) {
    if (unit >= 0 && stage == 0) request.load<true>(ring, unit, place[0], lane);
    if (unit >= 0 && stage) request.load<false>(ring + stage * UNIT_BYTES, unit, place[stage], lane);
    copies_commit();
  }
  // Heads of the group, then k, then v, which CTA 0 alone needs; what is constant of them comes early.
  const int num_heads = rank == 0 ? GROUP + 2 : GROUP;
  uint4 weight[PASSES], raw[PASSES];
  Turn turn;
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    const int head = first_head + pass * A_PASS, row = head < GROUP ? kv_head * GROUP + head : NUM_HEADS + kv_head;
    weight[pass] =
        head <= GROUP ? *(const uint4*)(qk_norm + row * HEAD_DIM + lane_of_head * 8) : make_uint4(0, 0, 0, 0);
  }
  turn.load(cos_sin, position, lane_of_head);
  wait_for_previous_kernel();
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    const int head = first_head + pass * A_PASS;
    const int row = head < GROUP    ? kv_head * GROUP + head
                    : head == GROUP ? NUM_HEADS + kv_head
                                    : NUM_HEADS + NUM_KV_HEADS + kv_head;
    raw[pass] = make_uint4(0, 0, 0, 0);
    if (head < num_heads) raw[pass] = __ldcg((const uint4*)(qkv + (token * ALL + row) * HEAD_DIM + lane_of_head * 8));
  }
  cluster_wait();  // every CTA's barrier is there; while qkv comes
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    const int head = first_head + pass * A_PASS;
    if (pass * A_PASS + warp * (32 / LANES) >= num_heads) continue;  // alike for a warp
    const uint4 turned = norm_and_turn(raw[pass], weight[pass], eps, turn);
    if (head < GROUP) {
      *(uint4*)(ring_memory + q_at(Q, head, lane_of_head)) = turned;
    } else if (head < num_heads && length) {
      const bool is_key = head == GROUP;
      const uint4 words = is_key ? turned : raw[pass];
      const int byte = lane_of_head * 8 * (int)sizeof(Kv);
      const u32 at = kv_at(is_key ? 0 : V_OF_UNIT, (length - 1) % UNIT, byte / 16) + byte % 16;
      store_kv((Kv*)(ring_memory + at), words);
      Kv* cache = is_key ? k_cache : v_cache;
      store_kv(cache + (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM + lane_of_head * 8, words);
    }
  }
  __syncthreads();
  if (first >= 0) {
    Queries q;
    q.load(memory, lane);
    Sums sums;
    sums.clear();
    u32 at = ring;
#pragma unroll 1
    for (int unit = first; unit >= 0; unit -= CTAS * WARPS) {
      const int next = unit - STAGES * CTAS * WARPS, next_place = next >= 0 ? request.place(next, lane) : 0;
      copies_wait<STAGES - 1>();
      __syncwarp();
      sums.add(at, unit, length, q, scale, lane);
      __syncwarp();
      if (next >= 0) request.load<false>(at, next, next_place, lane);
      copies_commit();
      at = at + UNIT_BYTES == ring + RING_BYTES ? ring : at + UNIT_BYTES;
    }
    sums.store((float*)(ring_memory + warp * RING_BYTES), (float2*)(ring_memory + STATS) + warp * ROWS, lane);
  }
  __syncthreads();
  const int num_warps = max(0, min(WARPS, (num_units - (int)rank + CTAS - 1) / CTAS));
  if (num_warps) send(memory, num_warps, rank, scale);
  barrier_wait(memory + BARRIER, 0);
  finish(out + (token * NUM_HEADS + kv_head * GROUP) * HEAD_DIM + rank * COLUMNS, min(CTAS, num_units), scale);
}
