// combine_norm.cu: residual = bf16(residual + bf16(sum over k of weights[t, k] * y[t, k])), the sum in float32, in k
// order, as combine.cu; out = the norm of the new residual, as add_norm.cu.
// Grid: one CTA a row, 8 columns a thread: TOP_K rows of y in flight at once. Pairs with a negative id are skipped,
// their rows of y may hold anything; without ids all count. Needs: HIDDEN % 8 == 0.
#include "norm.cuh"

#ifndef TOP_K
#define TOP_K 8
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    combine_add_rms_norm(const u16* y, const int* ids, const float* topk_weights, u16* residual,
                         const u16* __restrict__ weight, float eps, u16* out) {
  allow_next_kernel();
  uint4 w[VECTORS];
  load_weight(weight, w);
  wait_for_previous_kernel();
  const i64 row = blockIdx.x;
  bool used[TOP_K];
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) used[k] = true;
  if (ids) {
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) used[k] = ids[row * TOP_K + k] >= 0;
  }
  float share[TOP_K];
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) share[k] = topk_weights[row * TOP_K + k];
  Piece sum[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int column = piece_column(i);
    if (column >= HIDDEN) continue;
    uint4 part[TOP_K];
    const uint4 old = *(const uint4*)(residual + row * HIDDEN + column);
#pragma unroll
    for (int k = 0; k < TOP_K; ++k)
      if (used[k]) part[k] = __ldcs((const uint4*)(y + (row * TOP_K + k) * HIDDEN + column));
    Piece total = {};
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) {
      if (!used[k]) continue;
      const Piece p = unpack_piece(part[k]);
#pragma unroll
      for (int j = 0; j < 8; ++j) total.v[j] = __fmaf_rn(share[k], p.v[j], total.v[j]);
    }
    total = unpack_piece(pack_piece(total));
    sum[i] = unpack_piece(old);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[i].v[j] = __fadd_rn(sum[i].v[j], total.v[j]);
    const uint4 rounded = pack_piece(sum[i]);
    *(uint4*)(residual + row * HIDDEN + column) = rounded;
    sum[i] = unpack_piece(rounded);
  }
  norm_and_store(sum, w, eps, out + row * HIDDEN);
}
