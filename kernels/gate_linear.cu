// gate_linear.cu: which experts a token goes to, from its hidden state: logits = bf16(x @ gate^T), softmax in float32,
// the TOP_K largest: one launch instead of a product, its split sums and a top-k. Grid: a cluster of CTAS CTAs for 8
// tokens; a CTA makes GROUPS groups of 8 experts' logits (thin_gemm.cuh), TEAMS at a time, and leaves each token's in
// the shared memory of the CTA that chooses for it. Dynamic shared memory: x, a team's each, TEAMS * WARPS * LOADS *
// ROWS * 64 bytes.  Needs: K % 32 == 0, NUM_EXPERTS % (8 * CTAS) == 0; sm_90 or newer, for the cluster.
#define MAX_DEPTH 16
#include "hopper.cuh"
#include "thin_gemm.cuh"
#include "topk.cuh"

#ifndef CTAS
#define CTAS 8
#endif
#ifndef TEAMS
#define TEAMS 2
#endif

constexpr int GROUPS = NUM_EXPERTS / 8 / CTAS, TOKENS_EACH = 8 / CTAS, ALL_WARPS = TEAMS * WARPS;
static_assert(NUM_EXPERTS % (8 * CTAS) == 0 && 8 % CTAS == 0 && TEAMS <= GROUPS, "gate_linear.cu: NUM_EXPERTS or CTAS");

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(ALL_WARPS * 32)
    gate_linear(const u16* x, int num_tokens, const u16* gate, const i64* rows, int* topk_ids, float* topk_weights,
                int* counts) {
  allow_next_kernel();
  extern __shared__ uint4 shared_x[];
  __shared__ float parts[GROUPS][WARPS][64];
  __shared__ float logits[TOKENS_EACH][NUM_EXPERTS];
  const int rank = cluster_rank(), first = blockIdx.x / CTAS * 8, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int team = warp / WARPS, first_group = rank * GROUPS;
  ThinGemm gemm(warp % WARPS, shared_x + team * WARPS * ThinGemm::X_PIECES);
  gemm.start(gate, first_group + team);
  wait_for_previous_kernel();
  gemm.load_rows(x + (i64)first * K, min(ROWS, num_tokens - first));
#pragma unroll 1
  for (int i = team; i < GROUPS; i += TEAMS)
    gemm.group_sums(first_group + i, i + TEAMS < GROUPS ? first_group + i + TEAMS : -1, parts[i][warp % WARPS]);
  cluster_sync();  // of this CTA's parts, and every CTA of the cluster is there to be written to
  for (int place = threadIdx.x; place < GROUPS * ROWS * 8; place += ALL_WARPS * 32) {
    const int group = place / (ROWS * 8), token = place % (ROWS * 8) / 8, output = place % 8;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += parts[group][w][token * 8 + output];
    sum = bf16_low(pack_bf16(sum, 0.0f));
    const u32 at = shared_address(&logits[token / CTAS][(first_group + group) * 8 + output]);
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(in_cluster(at, token % CTAS)), "f"(sum) : "memory");
  }
  cluster_sync();
  for (int mine = warp; mine < TOKENS_EACH; mine += ALL_WARPS) {
    const int place = mine * CTAS + rank;
    const i64 token = first + place;
    if (place >= ROWS || token >= num_tokens) return;
    float logit[PER_LANE], weight;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      logit[i] = i * 32 + lane < NUM_EXPERTS ? logits[mine][i * 32 + lane] : __int_as_float(0xff800000);
    int id;
    softmax_topk(logit, id, weight);
    if (rows && rows[token] < 0) id = -1;  // padding of a captured step
    if (lane >= TOP_K) continue;
    topk_ids[token * TOP_K + lane] = id;
    topk_weights[token * TOP_K + lane] = weight;
    if (counts && id >= 0) atomicAdd(counts + id, 1);
  }
}
