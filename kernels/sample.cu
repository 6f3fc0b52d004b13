// sample.cu: logits -> next ids, thinking state and forced tokens included, all on the device. Rows do not see each
// other.
//   sample_scan    one warp a block of 256 ids: its best id, and of rows that are drawn the sum of exp((logit - best) /
//   T).
//                  Grid: (spans of 16 blocks, rows), 256 threads: the one pass over the logits.
//   sample_choose  one CTA a row: the best of the blocks, or a draw (sample_draw.cuh); then the fold of thinking.py.
//   sample_admit   one warp a staged slot: takes its state over.
//   sample_uniforms  the draws' random numbers alone, for tests.
#include "sample_draw.cuh"

extern "C" __global__ void __launch_bounds__(256)
    sample_scan(const void* logits, i64 stride, int vocab_size, int num_blocks, const int* slots, const Slot* state,
                u64* best, double* mass) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const i64 row = blockIdx.y;
  const int slot = slots[row], lane = threadIdx.x & 31;
  const int first_block = blockIdx.x * 16 + (threadIdx.x >> 5) * 2;
  float v[2][8];
  int count[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    count[i] = load_8(row_of(logits, row, stride), (first_block + i) * BLOCK_IDS + lane * 8, vocab_size, v[i]);
  if (slot < 0) return;
  const float temperature = (float)state[slot].temperature;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int block = first_block + i;
    if (block >= num_blocks) return;
    u64 mine = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j >= count[i]) continue;
      const u64 rank = rank_of(key_of(v[i][j]), block * BLOCK_IDS + lane * 8 + j);
      mine = rank > mine ? rank : mine;
    }
    mine = warp_max(mine);
    if (lane == 0) best[row * num_blocks + block] = mine;
    if (temperature == 0.0f) continue;
    const u32 key = key_of_rank(mine);
    double sum = 0.0;
    if (finite_key(key)) {
      const float largest = value_of(key);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < count[i]) sum += (double)expf(__fdiv_rn(__fsub_rn(v[i][j], largest), temperature));
    }
    sum = warp_sum(sum);
    if (lane == 0) mass[row * num_blocks + block] = sum;
  }
}

// ThinkingState.accept.
__device__ __forceinline__ void accept(Slot& s, int id) {
  if (!s.has_thinking) return;
  if (s.cursor >= 0) {
    ++s.cursor;
    if (id == s.end_think_id) s.inside = 0;
    if (s.cursor == s.num_closing) s.cursor = -1, s.inside = 0;
    return;
  }
  if (id == s.think_id) s.inside = 1;
  if (s.inside) ++s.num_spent;
  if (id == s.end_think_id) s.inside = 0;
  if (s.inside && s.num_spent >= s.budget && s.num_closing > 0) s.cursor = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sample_choose(const void* logits, i64 stride, int vocab_size, int num_blocks, const int* slots, Slot* state,
                  i64* last_token, const u64* best, double* mass, i64* ids, u8* flags) {
  allow_next_kernel();
  wait_for_previous_kernel();
  __shared__ Shared s;
  const i64 at = blockIdx.x;
  const int slot = slots[at];
  if (slot < 0) {
    if (threadIdx.x == 0) ids[at] = 0, flags[at] = 0;
    return;
  }
  u64 top = 0;
  for (int b = threadIdx.x; b < num_blocks; b += THREADS) {
    const u64 rank = best[at * num_blocks + b];
    top = rank > top ? rank : top;
  }
  Slot& mine = state[slot];
  const double temperature = mine.temperature;
  const int forced = mine.has_thinking && mine.cursor >= 0 ? mine.closing[mine.cursor] : -1;
  top = block_max(s, top);
  const bool finite = finite_key(key_of_rank(top));
  int id = id_of(top);
  if (finite && forced < 0 && temperature > 0.0) {
    Row row;
    row.logits = row_of(logits, at, stride);
    row.vocab_size = vocab_size, row.num_blocks = num_blocks;
    row.best = best + at * num_blocks, row.mass = mass + at * num_blocks;
    row.largest = value_of(key_of_rank(top));
    row.temperature = temperature, row.temperature_f = (float)temperature;
    row.top_p = mine.top_p, row.min_p = mine.min_p, row.top_k = mine.top_k;
    row.uniform = uniform_of(mine.seed, mine.position);
    const bool truncated = row.top_k > 0 || row.top_p < 1.0 || row.min_p > 0.0;
    if (!truncated || !draw_among_few(s, row, id)) id = draw_among_many(s, row);
  }
  if (forced >= 0) id = forced;
  __syncthreads();  // everybody has read the state
  if (threadIdx.x == 0) {
    ids[at] = id;
    flags[at] = (finite ? 1 : 0) | (forced >= 0 ? 2 : 0);
    last_token[slot] = id;
    ++mine.position;
    accept(mine, id);
  }
}

extern "C" __global__ void __launch_bounds__(32) sample_admit(const Slot* staged, Slot* state, i64* last_token) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const Slot& from = staged[blockIdx.x];
  ((uint4*)(state + from.slot))[threadIdx.x] = ((const uint4*)&from)[threadIdx.x];
  if (threadIdx.x == 0) last_token[from.slot] = from.last_token;
}

extern "C" __global__ void __launch_bounds__(32)
    sample_uniforms(const u64* seeds, const u64* positions, int count, double* uniforms) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int i = blockIdx.x * 32 + threadIdx.x;
  if (i < count) uniforms[i] = uniform_of(seeds[i], positions[i]);
}
