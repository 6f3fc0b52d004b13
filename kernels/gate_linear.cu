// gate_linear.cu: which experts a token goes to, from its hidden state: logits = bf16(x @ gate^T), softmax in float32,
// the TOP_K largest: one launch instead of a product, its split sums and a top-k. Grid: a cluster of CTAS CTAs for 8
// tokens; each makes GROUPS groups of 8 experts' logits (thin_gemm.cuh) and sends each token's to the CTA that chooses.
//
// A logit travels as a store that completes its own 4 bytes on the receiver's barrier (st.async): who chooses waits for
// what it needs and nobody else waits. A barrier of the whole cluster instead is two fences of all memory at GPU scope.
// Needs: K % 32 == 0, NUM_EXPERTS % (8 * CTAS) == 0; sm_90 or newer, for the cluster.
#include "hopper.cuh"
#include "thin_gemm.cuh"
#include "topk.cuh"

#ifndef CTAS
#define CTAS 8
#endif

// AHEAD groups' weights are in registers before the rows are there, the others in the L2.
constexpr int GROUPS = NUM_EXPERTS / 8 / CTAS, TOKENS_EACH = 8 / CTAS, AHEAD = GROUPS % 2 || WARPS > 8 ? 1 : 2;
static_assert(NUM_EXPERTS % (8 * CTAS) == 0 && 8 % CTAS == 0 && GROUPS % AHEAD == 0,
              "gate_linear.cu: NUM_EXPERTS or CTAS");

struct GateMemory {  // shared
  float parts[GROUPS][WARPS][64];
  float logits[TOKENS_EACH][NUM_EXPERTS];
  u64 arrived;  // of `logits`
};

struct Gate {
  ThinGemm gemm[AHEAD];
  GateMemory& memory;
  const int rank, num_tokens;  // of the cluster

  __device__ __forceinline__ Gate(GateMemory& memory, int num_tokens)
      : memory(memory), rank(cluster_rank()), num_tokens(num_tokens) {}

  // Before the inputs are there: weights on their way, every CTA there to be written to.
  __device__ __forceinline__ void start(const u16* gate) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) gemm[i].start(gate, rank * GROUPS + i);
#pragma unroll
    for (int i = AHEAD; i < GROUPS; ++i) gemm[0].prefetch(rank * GROUPS + i);
    if (threadIdx.x == 0) {
      const int chosen = num_tokens > rank ? (num_tokens - rank + CTAS - 1) / CTAS : 0;
      barrier_init(shared_address(&memory.arrived), 1);
      barriers_visible();
      barrier_arrive_expect(shared_address(&memory.arrived), chosen * NUM_EXPERTS * (int)sizeof(float));
    }
    __syncwarp();
    cluster_started();
  }

  // All tokens' logits for this CTA's experts, x being in gemm[0].x: rounded as a product's, sent on.
  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) gemm[AHEAD - 1].x[i] = gemm[0].x[i];
    // A loop, of a length that the compiler does not know: in one straight line the assembler would issue a load of x,
    // multiply by it and issue the next.
    const int groups = GROUPS * gridDim.y, begin = rank * GROUPS, warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int first_of = 0; first_of < groups; first_of += AHEAD)
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int group = first_of + i, next = group + AHEAD;
        gemm[i].group_sums(begin + group, GROUPS > AHEAD && next < groups ? begin + next : -1,
                           memory.parts[group][warp]);
      }
    __syncthreads();
    for (int place = threadIdx.x; place < GROUPS * 64; place += WARPS * 32) {
      const int group = place / 64, token = place % 64 / 8;
      if (token >= num_tokens) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += memory.parts[group][w][place % 64];
      sum = bf16_low(pack_bf16(sum, 0.0f));
      const u32 at = shared_address(&memory.logits[token / CTAS][(rank * GROUPS + group) * 8 + place % 8]);
      store_cluster_async(in_cluster(at, token % CTAS), sum, in_cluster(shared_address(&memory.arrived), token % CTAS));
    }
  }

  // Until the logits of this CTA's tokens are there. False: it has no token.
  __device__ __forceinline__ bool wait() const {
    if (rank >= num_tokens) return false;
    barrier_wait(shared_address(&memory.arrived), 0);
    return true;
  }

  // By all warps, one for each token: ids and weights of the cluster's first token on.
  __device__ __forceinline__ void choose(const bool (&nowhere)[TOKENS_EACH], int* topk_ids, float* topk_weights,
                                         int* counts) const {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int mine = 0; mine < TOKENS_EACH; ++mine) {
      const int token = mine * CTAS + rank;
      if ((int)(threadIdx.x >> 5) != mine % WARPS || token >= num_tokens) continue;
      float logit[PER_LANE], weight;
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i)
        logit[i] = i * 32 + lane < NUM_EXPERTS ? memory.logits[mine][i * 32 + lane] : __int_as_float(0xff800000);
      int id;
      softmax_topk(logit, id, weight);
      if (nowhere[mine]) id = -1;
      if (lane >= TOP_K) continue;
      topk_ids[token * TOP_K + lane] = id;
      topk_weights[token * TOP_K + lane] = weight;
      if (counts && id >= 0) atomicAdd(counts + id, 1);
    }
  }

  // Which of this CTA's tokens are a step's padding.
  __device__ __forceinline__ void read_rows(const i64* rows, bool (&nowhere)[TOKENS_EACH]) const {
#pragma unroll
    for (int mine = 0; mine < TOKENS_EACH; ++mine) {
      const int token = mine * CTAS + rank;
      nowhere[mine] = rows && token < num_tokens && rows[token] < 0;
    }
  }
};

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(WARPS * 32)
    gate_linear(const u16* x, int num_tokens, const u16* gate, const i64* rows, int* topk_ids, float* topk_weights,
                int* counts) {
  allow_next_kernel();
  __shared__ GateMemory memory;
  const int first = blockIdx.x / CTAS * 8;
  Gate mine(memory, min(8, num_tokens - first));
  mine.start(gate);
  wait_for_previous_kernel();
  mine.gemm[0].load_rows(x + (i64)first * K, mine.num_tokens);
  bool nowhere[TOKENS_EACH];
  mine.read_rows(rows ? rows + first : rows, nowhere);
  mine.multiply();
  if (mine.wait()) mine.choose(nowhere, topk_ids + (i64)first * TOP_K, topk_weights + (i64)first * TOP_K, counts);
}
