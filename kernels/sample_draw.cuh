// sample_draw.cuh: one drawn row by one CTA: inverse CDF over what temperature, top-k, top-p and min-p leave, by the
// rule of cluster/attention/draw.py. Sums are float64 in an order that the row alone fixes.
#pragma once
#include "sample.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int LIST = 4096, PER_THREAD = LIST / THREADS;  // candidates that are sorted in shared memory
constexpr int NUM_CANDIDATES = 256;                      // what top-p and min-p without top-k usually keep less of
constexpr int KEY_SHIFT = LOGITS_F32 ? 0 : 16;           // a bf16's key is told by its upper half

struct Shared {
  u64 list[LIST];
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

// s.list[0 .. count) falling; `count` > 0. Padded with zeros, which no rank is.
__device__ __forceinline__ void sort_list(Shared& s, int count) {
  int padded = 2;
  while (padded < count) padded *= 2;
  for (int i = count + threadIdx.x; i < padded; i += THREADS) s.list[i] = 0;
  __syncthreads();
  for (int width = 2; width <= padded; width *= 2)
    for (int step = width / 2; step; step /= 2) {
      for (int i = threadIdx.x; i < padded / 2; i += THREADS) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const u64 a = s.list[low], b = s.list[high];
        if ((a < b) == ((low & width) == 0)) s.list[low] = b, s.list[high] = a;
      }
      __syncthreads();
    }
}

// What still counts: ranks from `cut` on, of these what min-p leaves, of these those with one key (0: any key).
struct Filter {
  u64 cut;
  u32 key;
  bool min_p, unit;  // unit: each counts 1 instead of its weight
};

__device__ __forceinline__ double weight_of(const Row& row, const Filter& f, float logit, int id) {
  const u32 key = key_of(logit);
  const float w = row.weight(logit);
  const bool counts =
      rank_of(key, id) >= f.cut && (f.key == 0 || f.key == key) && (!f.min_p || (w > 0.0f && (double)w >= row.min_p));
  return counts ? (f.unit ? 1.0 : (double)w) : 0.0;
}

// row.mass[b] = what counts of block b.
__device__ __forceinline__ void sum_blocks(const Row& row, const Filter& f) {
  for (int b = threadIdx.x >> 5; b < row.num_blocks; b += WARPS) {
    const int first = b * BLOCK_IDS + (threadIdx.x & 31) * 8;
    float v[8];
    const int count = load_8(row.logits, first, row.vocab_size, v);
    double sum = 0.0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < count) sum += weight_of(row, f, v[j], first + j);
    sum = warp_sum(sum);
    if ((threadIdx.x & 31) == 0) row.mass[b] = sum;
  }
  __syncthreads();
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
// `inclusive`), and that sum, `before`, over the keys above it. Eight parts of the range of keys a pass.
__device__ __forceinline__ u32 last_key_below(Shared& s, const Row& row, const Filter& f, u32 largest_key, double limit,
                                              bool inclusive, double& before) {
  constexpr int PROBES = 7;
  u32 low = LOWEST_KEY >> KEY_SHIFT, high = largest_key >> KEY_SHIFT;
  before = 0.0;
  while (low < high) {
    double above[PROBES] = {};
    auto probe = [&](int p) { return low + (u32)((u64)(high - low) * p / (PROBES + 1)); };
    for (int first = threadIdx.x * 8; first < row.vocab_size; first += THREADS * 8) {
      float v[8];
      const int count = load_8(row.logits, first, row.vocab_size, v);
#pragma unroll 1
      for (int j = 0; j < 8; ++j) {
        float logit = v[0];
#pragma unroll
        for (int i = 1; i < 8; ++i) logit = i == j ? v[i] : logit;
        const double w = j < count ? weight_of(row, f, logit, first + j) : 0.0;
        const u32 key = key_of(logit) >> KEY_SHIFT;
#pragma unroll
        for (int p = 0; p < PROBES; ++p)
          if (key > probe(p)) above[p] += w;
      }
    }
    u32 next_low = low, next_high = high;
#pragma unroll
    for (int p = PROBES - 1; p >= 0; --p) above[p] = block_sum(s, above[p]);
    bool found = false;
#pragma unroll
    for (int p = 0; p < PROBES; ++p) {
      if (found) continue;
      found = inclusive ? above[p] <= limit : above[p] < limit;
      if (found)
        next_high = probe(p), before = above[p];
      else
        next_low = probe(p) + 1;
    }
    low = next_low, high = next_high;
  }
  return KEY_SHIFT == 0 ? high : high & 0x8000u ? high << 16 : high << 16 | 0xffffu;
}

// Few are kept: the best ones sorted. -> false where they do not fit, or more than NUM_CANDIDATES are kept.
__device__ __forceinline__ bool draw_among_few(Shared& s, const Row& row, int& chosen) {
  const int needed = min(row.top_k > 0 ? row.top_k : NUM_CANDIDATES, row.vocab_size);
  if (needed > LIST || row.num_blocks > LIST) return false;
  u64 lowest = 1;  // where each of `needed` blocks holds one that is as good, no worse one is among the best
  if (row.num_blocks >= needed) {
    for (int b = threadIdx.x; b < row.num_blocks; b += THREADS) s.list[b] = row.best[b];
    sort_list(s, row.num_blocks);
    lowest = s.list[needed - 1];
    lowest = lowest ? lowest : 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  for (int b = threadIdx.x >> 5; b < row.num_blocks; b += WARPS) {
    if (row.best[b] < lowest) continue;
    const int first = b * BLOCK_IDS + (threadIdx.x & 31) * 8;
    float v[8];
    const int count = load_8(row.logits, first, row.vocab_size, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const u64 rank = rank_of(key_of(v[j]), first + j);
      if (j >= count || rank < lowest) continue;
      const int place = atomicAdd(&s.count, 1);
      if (place < LIST) s.list[place] = rank;
    }
  }
  __syncthreads();
  const int found = s.count;
  if (found > LIST) return false;
  sort_list(s, found);

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
__device__ __forceinline__ int draw_among_many(Shared& s, const Row& row, u32 largest_key) {
  Filter f = {0, 0, false, false};
  const bool all = row.top_k == 0 && row.top_p >= 1.0 && row.min_p <= 0.0;
  bool cuts_k = row.top_k > 0, cuts_p = row.top_p < 1.0;
  for (;;) {
    double target;
    if (all) {  // the blocks' sums are there
      double sum = 0.0;
      for (int b = threadIdx.x; b < row.num_blocks; b += THREADS) sum += row.mass[b] = row.scaled_mass(b);
      target = row.uniform * block_sum(s, sum);
    } else {
      const bool draws = !cuts_k && !cuts_p;
      f = {f.cut, 0, draws, false};
      double mass = 0.0, count = 0.0;
      for (int first = threadIdx.x * 8; first < row.vocab_size; first += THREADS * 8) {
        float v[8];
        const int num = load_8(row.logits, first, row.vocab_size, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const double w = j < num ? weight_of(row, f, v[j], first + j) : 0.0;
          mass += w, count += w > 0.0;
        }
      }
      mass = block_sum(s, mass), count = block_sum(s, count);
      if (draws && row.top_k == 0 && count >= NUM_CANDIDATES && NUM_CANDIDATES < row.vocab_size) {
        target = row.uniform * mass;  // in the order of ids
      } else {
        f.unit = cuts_k;
        const double limit = cuts_k ? (double)row.top_k : cuts_p ? row.top_p * mass : row.uniform * mass;
        double before;
        f.key = last_key_below(s, row, f, largest_key, limit, draws, before);
        const double each = f.unit ? 1.0 : (double)row.weight(value_of(f.key));
        target = 1e9;  // how many equal ones come before it
        if (each > 0.0) target = draws ? floor((limit - before) / each) : ceil((limit - before) / each) - 1.0;
        target = fmax(target, 0.0);
        f.unit = true;
      }
      sum_blocks(row, f);
    }
    const int id = pick_id(s, row, f, target);
    if (!cuts_k && !cuts_p) return id;
    f.cut = rank_of(key_of(load_1(row.logits, id)), id);
    if (cuts_k)
      cuts_k = false;
    else
      cuts_p = false;
  }
}
