// combine_norm.cu: residual = bf16(residual + bf16(sum over k of weights[t, k] * y[t, k])), the sum in float32, in k
// order, as combine.cu; out = the norm of the new residual, as add_norm.cu.
// Grid: ROW_CTAS CTAs a row, 8 columns a thread: TOP_K rows of y in flight at once. Pairs with a negative id are
// skipped, their rows of y may hold anything: they are read, not to wait for the ids first, and not used. Without ids
// all count. Needs: HIDDEN % 8 == 0; ROW_CTAS > 1: sm_90.
#include "norm.cuh"

#ifndef TOP_K
#define TOP_K 8
#endif
#if ROW_CTAS > 1
#define CLUSTER __cluster_dims__(ROW_CTAS, 1, 1)
#else
#define CLUSTER
#endif

template <class T>
__device__ __forceinline__ void load_all(const T* from, T (&to)[TOP_K]) {
  if constexpr (TOP_K % 4 == 0) {
#pragma unroll
    for (int k = 0; k < TOP_K; k += 4) *(uint4*)(to + k) = *(const uint4*)(from + k);
  } else {
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) to[k] = from[k];
  }
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS)
    combine_add_rms_norm(const u16* y, const int* ids, const float* topk_weights, u16* residual, const u16* weight,
                         float eps, u16* out) {
  allow_next_kernel();
  begin_row();
  uint4 w[VECTORS];
  load_weight(weight, w);
  wait_for_previous_kernel();
  const i64 row = blockIdx.x / ROW_CTAS;
  alignas(16) int id[TOP_K];  // without ids any numbers: a branch here would keep the loads of y waiting for the ids
  alignas(16) float share[TOP_K];
  load_all(ids ? ids + row * TOP_K : (const int*)topk_weights + row * TOP_K, id);
  load_all(topk_weights + row * TOP_K, share);
  Piece sum[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int column = piece_column(i);
    if (column >= HIDDEN) continue;
    uint4 part[TOP_K];
    const uint4 old = *(const uint4*)(residual + row * HIDDEN + column);
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) part[k] = __ldcs((const uint4*)(y + (row * TOP_K + k) * HIDDEN + column));
    const uint4 minus_zeros = make_uint4(0x80008000u, 0x80008000u, 0x80008000u, 0x80008000u);  // times 0 adds nothing
    bool used[TOP_K];
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) {
      used[k] = !ids || id[k] >= 0;
      if (!used[k]) share[k] = 0.0f;
    }
    Piece total = {};
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) {
      const Piece p = unpack_piece(used[k] ? part[k] : minus_zeros);
#pragma unroll
      for (int j = 0; j < 8; ++j) total.v[j] = __fmaf_rn(share[k], p.v[j], total.v[j]);
    }
    const uint4 rounded = add_pieces(unpack_piece(old), unpack_piece(pack_piece(total)));
    *(uint4*)(residual + row * HIDDEN + column) = rounded;
    sum[i] = unpack_piece(rounded);
  }
  norm_and_store(sum, w, eps, out + row * HIDDEN);
}
