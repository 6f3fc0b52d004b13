// sample_draw.cuh: one drawn row by one CTA: inverse CDF over what temperature, top-k, top-p and min-p leave, by the
// rule of cluster/attention/draw.py. Sums are float64 in an order that the row alone fixes.
#pragma once
#include "sample.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int LIST = 4096, PER_THREAD = LIST / THREADS;  // candidates that are sorted in shared memory
constexpr int MAX_BLOCKS = 1024;                         // of a row, for the sorted way
constexpr int NUM_CANDIDATES = 256;                      // what top-p and min-p without top-k usually keep less of
constexpr int KEY_SHIFT = LOGITS_F32 ? 0 : 16;           // a bf16's key is told by its upper half

// The lowest or highest key with these upper bits: the one that a bf16 has.
__device__ __forceinline__ u32 whole_key(u32 upper) {
  return KEY_SHIFT == 0 ? upper : upper & 0x8000u ? upper << 16 : upper << 16 | 0xffffu;
}

struct Shared {
  u64 list[LIST], blocks[MAX_BLOCKS];
  double of_warp[WARPS];
  u64 best_of_warp[WARPS];
  int count, first, last;
};

struct Row {
  const void* logits;
  int vocab_size, num_blocks;
  const u64* best;  // [num_blocks] rank of the best id of each block
  double* mass;     // [num_blocks] sum of exp((logit - block's largest) / temperature); then scratch
  float largest, temperature_f;
  double temperature, top_p, min_p, uniform;
  int top_k;

  __device__ float weight(float logit) const { return expf(__fdiv_rn(__fsub_rn(logit, largest), temperature_f)); }
  __device__ double scaled_mass(int block) const {
    const u32 key = key_of_rank(best[block]);
    return key > LOWEST_KEY ? mass[block] * exp(((double)value_of(key) - (double)largest) / temperature) : 0.0;
  }
};

// ------------------------------------------------------------------------------------------------------ CTA-wide steps
__device__ __forceinline__ u64 block_max(Shared& s, u64 v) {
  v = warp_max(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) s.best_of_warp[threadIdx.x >> 5] = v;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) v = s.best_of_warp[w] > v ? s.best_of_warp[w] : v;
  return v;
}

__device__ __forceinline__ double block_sum(Shared& s, double v) {
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) s.of_warp[threadIdx.x >> 5] = v;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += s.of_warp[w];
  return total;
}

// Sum of what the threads before this one hold; `total` of all.
__device__ __forceinline__ double block_before(Shared& s, double v, double& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  double inclusive = v;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const double other = __shfl_up_sync(0xffffffffu, inclusive, d);
    if (lane >= d) inclusive += other;
  }
  double before = __shfl_up_sync(0xffffffffu, inclusive, 1);
  if (lane == 0) before = 0.0;
  __syncthreads();
  if (lane == 31) s.of_warp[warp] = inclusive;
  __syncthreads();
  total = 0.0;
  double warps_before = 0.0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    if (w == warp) warps_before = total;
    total += s.of_warp[w];
  }
  return warps_before + before;
}

// The lowest index any thread offers with `hit`, else the highest offered with `positive`. Indices are not negative.
__device__ __forceinline__ int block_pick(Shared& s, int hit, int positive) {
  __syncthreads();
  if (threadIdx.x == 0) s.first = 0x7fffffff, s.last = 0;
  __syncthreads();
  if (hit >= 0) atomicMin(&s.first, hit);
  if (positive >= 0) atomicMax(&s.last, positive);
  __syncthreads();
  return s.first != 0x7fffffff ? s.first : s.last;
}

// list[0 .. count) falling; `count` > 0. Padded with zeros, which no rank is.
__device__ __forceinline__ void sort_list(u64* list, int count) {
  int padded = 2;
  while (padded < count) padded *= 2;
  for (int i = count + threadIdx.x; i < padded; i += THREADS) list[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int width = 2; width <= padded; width *= 2)
#pragma unroll 1
    for (int step = width / 2; step; step /= 2) {
      for (int i = threadIdx.x; i < padded / 2; i += THREADS) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const u64 a = list[low], b = list[high];
        if ((a < b) == ((low & width) == 0)) list[low] = b, list[high] = a;
      }
      __syncthreads();
    }
}

// What still counts: ranks from `cut` on, of these what min-p leaves, of these those with one key (0: any key).
struct Filter {
  u64 cut;
  u32 key;
  bool min_p, unit;  // unit: each counts 1 instead of its weight
  float lowest;      // no smaller logit counts

  __device__ Filter(u64 cut, u32 key, bool min_p, bool unit) : cut(cut), key(key), min_p(min_p), unit(unit) {
    const u32 least = key ? key : key_of_rank(cut);
    lowest = value_of(least ? least : LOWEST_KEY);
  }
};

__device__ __forceinline__ double weight_of(const Row& row, const Filter& f, float logit, int id) {
  if (logit < f.lowest) return 0.0;
  const u32 key = key_of(logit);
  if (rank_of(key, id) < f.cut || (f.key && f.key != key)) return 0.0;
  if (f.unit && !f.min_p) return 1.0;
  const float w = row.weight(logit);
  if (f.min_p && !(w > 0.0f && (double)w >= row.min_p)) return 0.0;
  return f.unit ? 1.0 : (double)w;
}

// row.mass[b] = what counts of block b; -> the sum of all, and of how many.
__device__ __forceinline__ double sum_blocks(Shared& s, const Row& row, const Filter& f, double& count) {
  double total = 0.0;
  count = 0.0;
#pragma unroll 1
  for (int b = threadIdx.x >> 5; b < row.num_blocks; b += WARPS) {
    const int first = b * BLOCK_IDS + (threadIdx.x & 31) * 8;
    float v[8];
    const int num = load_8(row.logits, first, row.vocab_size, v);
    double sum = 0.0;
    bool any = false;
#pragma unroll
    for (int j = 0; j < 8; ++j) any |= j < num && v[j] >= f.lowest;
    if (any) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const double w = j < num ? weight_of(row, f, v[j], first + j) : 0.0;
        sum += w, count += w > 0.0;
      }
    }
    sum = warp_sum(sum);
    if ((threadIdx.x & 31) == 0) row.mass[b] = sum, total += sum;
  }
  count = block_sum(s, count);
  return block_sum(s, total);  // and every mass is there
}

// The first id up to which the sum of what counts exceeds `target`, else the last id that counts; row.mass is the sums
// of the blocks.
__device__ __forceinline__ int pick_id(Shared& s, const Row& row, const Filter& f, double target) {
  const int each = (row.num_blocks + THREADS - 1) / THREADS;
  const int from = min((int)threadIdx.x * each, row.num_blocks), to = min(from + each, row.num_blocks);
  double mine = 0.0, total;
  for (int b = from; b < to; ++b) mine += row.mass[b];
  const double start = block_before(s, mine, total);
  double before = start;
  int hit = -1, positive = -1;
  for (int b = from; b < to; ++b) {
    before += row.mass[b];
    if (hit < 0 && before > target) hit = b;
    if (row.mass[b] > 0.0) positive = b;
  }
  const int block = block_pick(s, hit, positive);
  if (from <= block && block < to) {
    before = start;
    for (int b = from; b < block; ++b) before += row.mass[b];
    s.of_warp[0] = before;
  }
  __syncthreads();
  const double base = s.of_warp[0];
  const int id = block * BLOCK_IDS + (int)threadIdx.x;
  double w = 0.0, inside;
  if (threadIdx.x < BLOCK_IDS && id < row.vocab_size) w = weight_of(row, f, load_1(row.logits, id), id);
  const double at = base + (block_before(s, w, inside) + w);
  return block_pick(s, w > 0.0 && at > target ? id : -1, w > 0.0 ? id : -1);
}

// In the order of ranks: the key of the last id with a sum of what counts before it below `limit` (or equal, where
// `inclusive`), and that sum, `before`, over the keys above it. `lowest`: a logit that is surely no larger. Eight parts
// of the range of keys a pass. Sums are of float32 by eights, then float64.
__device__ __forceinline__ u32 last_key_below(Shared& s, const Row& row, const Filter& f, float lowest, double limit,
                                              bool inclusive, double& before) {
  constexpr int PROBES = 7;
  const float to_log2 = 1.4426950408889634f / row.temperature_f;
  const bool plain = !f.unit && !f.min_p && f.cut == 0;
  u32 low = key_of(fmaxf(lowest, f.lowest)) >> KEY_SHIFT, high = key_of(row.largest) >> KEY_SHIFT;
  before = 0.0;
#pragma unroll 1
  while (low < high) {
    u32 key[PROBES];
    float probe[PROBES];
    double above[PROBES] = {};
#pragma unroll
    for (int p = 0; p < PROBES; ++p) {
      key[p] = low + (u32)((u64)(high - low) * p / (PROBES + 1));
      probe[p] = value_of(whole_key(key[p]));
    }
#pragma unroll 1
    for (int first = threadIdx.x * 8; first < row.vocab_size; first += THREADS * 8) {
      float v[8], sum[PROBES] = {};
      const int num = load_8(row.logits, first, row.vocab_size, v);
      float largest = v[0];
#pragma unroll
      for (int j = 1; j < 8; ++j) largest = fmaxf(largest, v[j]);
      if (!(largest > probe[0])) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float w = exp2f((v[j] - row.largest) * to_log2);
        if (!plain) w = (float)weight_of(row, f, v[j], first + j);
        if (j >= num) w = 0.0f;
#pragma unroll
        for (int p = 0; p < PROBES; ++p)
          if (v[j] > probe[p]) sum[p] += w;
      }
#pragma unroll
      for (int p = 0; p < PROBES; ++p) above[p] += (double)sum[p];
    }
    bool found = false;
#pragma unroll
    for (int p = 0; p < PROBES; ++p) {
      const double sum = block_sum(s, above[p]);
      if (found) continue;
      found = inclusive ? sum <= limit : sum < limit;
      if (found)
        high = key[p], before = sum;
      else
        low = key[p] + 1;
    }
  }
  return key_of(value_of(whole_key(high)));  // 0 where the search ended at -0
}

// Few are kept: the best ones sorted. -> false where they do not fit, or more than NUM_CANDIDATES are kept.
__device__ __forceinline__ bool draw_among_few(Shared& s, const Row& row, int& chosen) {
  const int needed = min(row.top_k > 0 ? row.top_k : NUM_CANDIDATES, row.vocab_size);
  if (needed > LIST || row.num_blocks > MAX_BLOCKS) return false;
  // Each of the `needed` best blocks holds one that is as good as `lowest`: no worse one is among the best.
  u64 lowest = 1;
  const bool some = row.num_blocks > needed;
  if (some) {
    for (int b = threadIdx.x; b < row.num_blocks; b += THREADS) s.blocks[b] = row.best[b];
    sort_list(s.blocks, row.num_blocks);
    lowest = s.blocks[needed - 1];
  }
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  const int num_looked = some ? needed : row.num_blocks;
  constexpr int AT_ONCE = 2;
#pragma unroll 1
  for (int i = threadIdx.x >> 5; i < num_looked; i += WARPS * AT_ONCE) {
    float v[AT_ONCE][8];
    int first[AT_ONCE], num[AT_ONCE];
#pragma unroll
    for (int a = 0; a < AT_ONCE; ++a) {
      const int at = i + a * WARPS;
      num[a] = 0;
      if (at >= num_looked) continue;
      first[a] = (some ? id_of(s.blocks[at]) / BLOCK_IDS : at) * BLOCK_IDS + (threadIdx.x & 31) * 8;
      num[a] = load_8(row.logits, first[a], row.vocab_size, v[a]);
    }
#pragma unroll
    for (int a = 0; a < AT_ONCE; ++a)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j >= num[a]) continue;
        const u64 rank = rank_of(key_of(v[a][j]), first[a] + j);
        if (rank < lowest) continue;
        const int place = atomicAdd(&s.count, 1);
        if (place < LIST) s.list[place] = rank;
      }
  }
  __syncthreads();
  const int found = s.count;
  if (found > LIST) return false;
  sort_list(s.list, found);

  const int from = threadIdx.x * PER_THREAD;
  double w[PER_THREAD], mine = 0.0, listed;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    w[i] = 0.0;
    if (from + i < needed) {
      const double logit = value_of(key_of_rank(s.list[from + i]));
      w[i] = exp((logit - (double)row.largest) / row.temperature);
    }
    mine += w[i];
  }
  double before = block_before(s, mine, listed);
  double total = listed;
  if (row.top_k == 0 && row.top_p < 1.0) {
    double sum = 0.0;
    for (int b = threadIdx.x; b < row.num_blocks; b += THREADS) {
      const u32 key = key_of_rank(row.best[b]);
      if (key > 0x007fffffu) sum += row.mass[b] * exp(((double)value_of(key) - (double)row.largest) / row.temperature);
    }
    total = block_sum(s, sum);
  }
  double kept = 0.0;
  int num_kept = 0;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const bool keep = w[i] > 0.0 && w[i] >= row.min_p && (row.top_p >= 1.0 || before < row.top_p * total);
    before += w[i];
    if (!keep) w[i] = 0.0;
    kept += w[i], num_kept += keep;
  }
  const int all_kept = (int)block_sum(s, (double)num_kept);
  if (row.top_k == 0 && all_kept >= needed && needed < row.vocab_size) return false;
  double cumulative = block_before(s, kept, listed);
  const double target = row.uniform * listed;
  int hit = -1, positive = -1;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    cumulative += w[i];
    if (w[i] > 0.0) {
      positive = from + i;
      if (hit < 0 && cumulative > target) hit = from + i;
    }
  }
  chosen = id_of(s.list[block_pick(s, hit, positive)]);
  return true;
}

// Many are kept, or too many are equal, or all are: cuts are searched for over the whole row, nothing is sorted. A turn
// of the loop finds one id: the last that top-k keeps, the last that top-p keeps, the drawn one.
__device__ __forceinline__ int draw_among_many(Shared& s, const Row& row) {
  const bool all = row.top_k == 0 && row.top_p >= 1.0 && row.min_p <= 0.0;
  bool cuts_k = row.top_k > 0, cuts_p = row.top_p < 1.0;
  u64 cut = 0;
#pragma unroll 1
  for (;;) {
    const bool draws = !cuts_k && !cuts_p;
    Filter f(cut, 0, draws && !all, cuts_k);
    double mass = 0.0, count = 0.0, target;
    if (all || (cuts_p && !cuts_k && cut == 0)) {  // the blocks' sums are there
      for (int b = threadIdx.x; b < row.num_blocks; b += THREADS) mass += row.mass[b] = row.scaled_mass(b);
      mass = block_sum(s, mass);
    } else if (!cuts_k) {
      mass = sum_blocks(s, row, f, count);
    }
    if (all || (draws && row.top_k == 0 && count >= NUM_CANDIDATES && NUM_CANDIDATES < row.vocab_size)) {
      target = row.uniform * mass;  // in the order of ids
    } else {
      const double limit = cuts_k ? (double)row.top_k : cuts_p ? row.top_p * mass : row.uniform * mass;
      float lowest =
          value_of(LOWEST_KEY);  // all that weigh less than this together cannot reach from the limit to the sum
      if (!cuts_k && mass > limit)
        lowest = row.largest + row.temperature_f * (logf((float)((mass - limit) / row.vocab_size)) - 0.01f);
      double before;
      const u32 key = last_key_below(s, row, f, lowest, limit, draws, before);
      const double each = f.unit ? 1.0 : (double)row.weight(value_of(key));
      target = 1e9;  // how many equal ones come before it
      if (each > 0.0) target = draws ? floor((limit - before) / each) : ceil((limit - before) / each) - 1.0;
      target = fmax(target, 0.0);
      f = Filter(cut, key, draws, true);
      sum_blocks(s, row, f, count);
    }
    const int id = pick_id(s, row, f, target);
    if (draws) return id;
    cut = rank_of(key_of(load_1(row.logits, id)), id);
    if (cuts_k)
      cuts_k = false;
    else
      cuts_p = false;
  }
}
