// add_norm.cu: residual = bf16(residual + x); out = bf16(bf16(residual / rms(residual)) * weight); float32 inside.
// Grid: one CTA a row, a thread holds 8 columns (more where HIDDEN > 8192); one pass over memory, one barrier.
// Without x the residual is only read. Needs: HIDDEN % 8 == 0.
#include "norm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    add_rms_norm(const u16* x, u16* residual, const u16* __restrict__ weight, float eps, u16* out) {
  allow_next_kernel();
  uint4 w[VECTORS];
  load_weight(weight, w);
  wait_for_previous_kernel();
  const i64 row = (i64)blockIdx.x * HIDDEN;
  uint4 old[VECTORS], added[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int column = piece_column(i);
    if (column >= HIDDEN) continue;
    old[i] = *(const uint4*)(residual + row + column);
    if (x) added[i] = *(const uint4*)(x + row + column);
  }
  Piece sum[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int column = piece_column(i);
    if (column >= HIDDEN) continue;
    sum[i] = unpack_piece(old[i]);
    if (!x) continue;
    const uint4 rounded = add_pieces(sum[i], unpack_piece(added[i]));
    *(uint4*)(residual + row + column) = rounded;
    sum[i] = unpack_piece(rounded);
  }
  norm_and_store(sum, w, eps, out + row);
}
