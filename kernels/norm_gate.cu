// norm_gate.cu: residual = bf16(residual + y), x = its norm (add_norm.cu), then the experts of x (gate_linear.cu): what
// stands between the output product and the experts, in one launch, bit for bit the two.
// Grid: a cluster of CTAS CTAs for 8 tokens. Thread t makes the 8 columns of piece t of a row's norm. One row (ROWS 1):
//   every CTA makes the norm for itself, which is sooner there than a copy from another; all have read the residual
//   when the first has all logits, and then it is written in place. More rows (ROWS 8): a CTA makes the rows of the
//   tokens that it chooses for, and stores them to all CTAs of the cluster.
// Needs: K == 256 * WARPS, so that a warp's pieces are the columns that it multiplies.
#ifndef K
#define K 2048
#endif
#ifndef WARPS
#define WARPS 8
#endif
#define HIDDEN K
#define THREADS (WARPS * 32)
#include "gate.cuh"
#include "norm.cuh"

#ifndef ROWS
#define ROWS 8
#endif

constexpr int PITCH = K / 8 + 4;                    // pieces; the 4 keep rows g and g + 1 out of each other's banks
constexpr int NORMS = ROWS == 1 ? 1 : TOKENS_EACH;  // made by a CTA
static_assert(VECTORS == 1 && LOADS == 8 && (ROWS == 1 || ROWS == 8), "norm_gate.cu: K, WARPS or ROWS");

extern __shared__ uint4 normed[];  // [ROWS][PITCH]

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(THREADS)
    norm_gate(const u16* y, u16* residual, const u16* norm_weight, float eps, u16* x, int num_tokens, const u16* gate,
              const i64* rows, int* topk_ids, float* topk_weights, int* counts) {
  allow_next_kernel();
  __shared__ GateMemory memory;
  __shared__ float squares_of_warp[NORMS][WARPS];
  __shared__ u64 rows_arrived;
  const int first = blockIdx.x / CTAS * 8, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Gate mine(memory, min(ROWS, num_tokens - first));
  const int count = mine.num_tokens, rank = mine.rank;
  if (ROWS > 1 && threadIdx.x == 0) {
    barrier_init(shared_address(&rows_arrived), 1);
    barrier_arrive_expect(shared_address(&rows_arrived), count * K * 2);
  }
  mine.start(gate);
  uint4 w[1];
  load_weight(norm_weight, w);
  wait_for_previous_kernel();

  const i64 begin = (i64)first * K + piece_column(0);
  uint4 old[NORMS], added[NORMS], sum[NORMS];
#pragma unroll
  for (int i = 0; i < NORMS; ++i) {
    const int token = ROWS == 1 ? 0 : i * CTAS + rank;
    if (token >= count) continue;
    old[i] = *(const uint4*)(residual + begin + (i64)token * K);
    added[i] = *(const uint4*)(y + begin + (i64)token * K);
  }
  bool nowhere[TOKENS_EACH];
  mine.read_rows(rows ? rows + first : rows, nowhere);
#pragma unroll
  for (int i = 0; i < NORMS; ++i) {
    sum[i] = add_pieces(unpack_piece(old[i]), unpack_piece(added[i]));
    const float squares = warp_sum(add_squares(unpack_piece(sum[i]), 0.0f));
    if (lane == 0) squares_of_warp[i][warp] = squares;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < NORMS; ++i) {
    const int token = ROWS == 1 ? 0 : i * CTAS + rank;
    if (token >= count) continue;
    const uint4 made = norm_piece(unpack_piece(sum[i]), w[0], rms_scale(sum_of_warps(squares_of_warp[i]), eps));
    if (ROWS == 1) {
      normed[threadIdx.x] = made;
      if (rank == 0) *(uint4*)(x + begin) = made;
      continue;
    }
#pragma unroll
    for (int to = 0; to < CTAS; ++to)
      store_cluster_async(in_cluster(shared_address(&normed[token * PITCH + threadIdx.x]), to), made.x, made.y, made.z,
                          made.w, in_cluster(shared_address(&rows_arrived), to));
    *(uint4*)(x + begin + (i64)token * K) = made;
    *(uint4*)(residual + begin + (i64)token * K) = sum[i];
  }
  if (ROWS == 1)
    __syncwarp();
  else
    barrier_wait(shared_address(&rows_arrived), 0);
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < LOADS; ++i)
    mine.gemm[0].x[i] = g < count ? normed[g * PITCH + warp * 32 + i * 4 + t] : make_uint4(0, 0, 0, 0);
  mine.multiply();
  if (!mine.wait()) return;
  if (ROWS == 1) *(uint4*)(residual + begin) = sum[0];
  mine.choose(nowhere, topk_ids + (i64)first * TOP_K, topk_weights + (i64)first * TOP_K, counts);
}
