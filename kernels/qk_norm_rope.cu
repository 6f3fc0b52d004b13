// qk_norm_rope.cu: q and k heads normed and rotated (qk_norm_rope.cuh); q to its own tensor, k and v to the slot of the
// paged cache. Grid: (tokens, spans of heads), 128 threads; PER_GROUP heads a group of lanes, so that prefill reads a
// position's cos and sin once for several heads.
// Needs: HEAD_DIM of 16, 32, 64, 128 or 256.
#include "qk_norm_rope.cuh"

#ifndef NUM_HEADS
#define NUM_HEADS 32
#endif
#ifndef NUM_KV_HEADS
#define NUM_KV_HEADS 4
#endif
#ifndef PER_GROUP
#define PER_GROUP 1
#endif

constexpr int GROUPS = 128 / LANES, NORMED = NUM_HEADS + NUM_KV_HEADS, ALL = NORMED + NUM_KV_HEADS;

extern "C" __global__ void __launch_bounds__(128)
    qk_norm_rope(const u16* qkv, const u16* __restrict__ qk_norm, float eps, const float* cos_sin, const i64* positions,
                 const i64* slot_mapping, Kv* k_cache, Kv* v_cache, u16* q) {
  allow_next_kernel();
  const int lane = threadIdx.x % LANES;
  const int first_head = blockIdx.y * (GROUPS * PER_GROUP) + threadIdx.x / LANES;
  uint4 weight[PER_GROUP];  // constant: before the kernel that makes qkv has ended
#pragma unroll
  for (int i = 0; i < PER_GROUP; ++i) {
    const int head = first_head + i * GROUPS;
    if (head < NORMED) weight[i] = __ldg((const uint4*)(qk_norm + head * HEAD_DIM + lane * 8));
  }
  wait_for_previous_kernel();
  const i64 token = blockIdx.x;
  const i64 position = positions[token], slot = slot_mapping[token];
  uint4 raw[PER_GROUP];
#pragma unroll
  for (int i = 0; i < PER_GROUP; ++i) {
    const int head = first_head + i * GROUPS;
    raw[i] = make_uint4(0, 0, 0, 0);
    if (head < ALL) raw[i] = __ldcs((const uint4*)(qkv + (token * ALL + head) * HEAD_DIM + lane * 8));
  }
  Turn turn;
  turn.load(cos_sin, position, lane);
#pragma unroll
  for (int i = 0; i < PER_GROUP; ++i) {
    const int head = first_head + i * GROUPS;
    const uint4 turned = norm_and_turn(raw[i], head < NORMED ? weight[i] : make_uint4(0, 0, 0, 0), eps, turn);
    if (head < NUM_HEADS) {
      *(uint4*)(q + (token * NUM_HEADS + head) * HEAD_DIM + lane * 8) = turned;
    } else if (head < ALL && slot >= 0) {
      const bool is_key = head < NORMED;
      const int kv_head = head - (is_key ? NUM_HEADS : NORMED);
      Kv* cache = is_key ? k_cache : v_cache;
      store_kv(cache + (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM + lane * 8, is_key ? turned : raw[i]);
    }
  }
}
