// gate_linear.cu: which experts a token goes to, from its hidden state: logits = bf16(x @ gate^T), softmax in float32,
// the TOP_K largest: one launch instead of a product, its split sums and a top-k. Grid: a cluster of CTAS CTAs for 8
// tokens; a CTA makes GROUPS groups of 8 experts' logits (thin_gemm.cuh) and leaves each token's in the shared memory
// of the CTA that chooses for it.  Needs: K % 32 == 0, NUM_EXPERTS % (8 * CTAS) == 0; sm_90 or
// newer, for the cluster.
#include "hopper.cuh"
#include "thin_gemm.cuh"
#include "topk.cuh"

#ifndef CTAS
#define CTAS 8
#endif

constexpr int GROUPS = NUM_EXPERTS / 8 / CTAS, TOKENS_EACH = 8 / CTAS, AHEAD = GROUPS % 2 || WARPS > 8 ? 1 : 2;
static_assert(NUM_EXPERTS % (8 * CTAS) == 0 && 8 % CTAS == 0 && GROUPS % AHEAD == 0,
              "gate_linear.cu: NUM_EXPERTS or CTAS");

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(WARPS * 32)
    gate_linear(const u16* x, int num_tokens, const u16* gate, const i64* rows, int* topk_ids, float* topk_weights,
                int* counts) {
  allow_next_kernel();
  __shared__ float parts[GROUPS][WARPS][64];
  __shared__ float logits[TOKENS_EACH][NUM_EXPERTS];
  const int rank = cluster_rank(), first = blockIdx.x / CTAS * 8, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  ThinGemm gemm[AHEAD];  // so many groups' weights are in registers before the rows are there, the others in the L2
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) gemm[i].start(gate, rank * GROUPS + i);
#pragma unroll
  for (int i = AHEAD; i < GROUPS; ++i) gemm[0].prefetch(rank * GROUPS + i);
  wait_for_previous_kernel();
  gemm[0].load_rows(x + (i64)first * K, min(8, num_tokens - first));
#pragma unroll
  for (int i = 0; i < LOADS; ++i) gemm[AHEAD - 1].x[i] = gemm[0].x[i];
  // A loop, of a length that the compiler does not know: in one straight line the assembler would issue a load of x,
  // multiply by it and issue the next.
  const int groups = GROUPS * gridDim.y, begin = rank * GROUPS;
#pragma unroll 1
  for (int first_of = 0; first_of < groups; first_of += AHEAD)
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int group = first_of + i, next = group + AHEAD;
      gemm[i].group_sums(begin + group, GROUPS > AHEAD && next < groups ? begin + next : -1, parts[group][warp]);
    }
  cluster_sync();  // of this CTA's parts, and every CTA of the cluster is there to be written to
  for (int place = threadIdx.x; place < GROUPS * 64; place += WARPS * 32) {
    const int group = place / 64, token = place % 64 / 8;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += parts[group][w][place % 64];
    sum = bf16_low(pack_bf16(sum, 0.0f));
    const u32 at = shared_address(&logits[token / CTAS][(rank * GROUPS + group) * 8 + place % 8]);
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(in_cluster(at, token % CTAS)), "f"(sum) : "memory");
  }
  cluster_sync();
  for (int mine = warp; mine < TOKENS_EACH; mine += WARPS) {
    const i64 token = first + mine * CTAS + rank;
    if (token >= num_tokens) return;
    float logit[PER_LANE], weight;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      logit[i] = i * 32 + lane < NUM_EXPERTS ? logits[mine][i * 32 + lane] : __int_as_float(0xff800000);
    int id;
    softmax_topk(logit, id, weight);
    if (rows && rows[token] < 0) id = -1;
    if (lane >= TOP_K) continue;
    topk_ids[token * TOP_K + lane] = id;
    topk_weights[token * TOP_K + lane] = weight;
    if (counts && id >= 0) atomicAdd(counts + id, 1);
  }
}
