// embed_norm.cu: residual[t] = table[id]; out[t] = its norm, as add_norm.cu: the first launch of a step.
// An id below 0 names a slot instead: the last token of slot -1 - id, which the sampler left on the device.
// Grid: one CTA a row.  Needs: HIDDEN % 8 == 0; a row whose id is outside the vocabulary becomes NaN.
#include "norm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    embed_rms_norm(const u16* __restrict__ table, i64 vocab_size, const i64* token_ids, const i64* last_token,
                   const u16* __restrict__ weight, float eps, u16* residual, u16* out) {
  allow_next_kernel();
  uint4 w[VECTORS];
  load_weight(weight, w);
  wait_for_previous_kernel();
  const i64 row = (i64)blockIdx.x * HIDDEN;
  i64 id = token_ids[blockIdx.x];
  if (id < 0 && last_token) id = last_token[-1 - id];
  const bool known = id >= 0 && id < vocab_size;
  Piece x[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int column = piece_column(i);
    if (column >= HIDDEN) continue;
    uint4 words = make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu);
    if (known) words = __ldg((const uint4*)(table + id * HIDDEN + column));
    *(uint4*)(residual + row + column) = words;
    x[i] = unpack_piece(words);
  }
  norm_and_store(x, w, eps, out + row);
}
