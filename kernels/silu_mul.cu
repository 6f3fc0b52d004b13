// silu_mul.cu: out[t] = bf16(bf16(silu(gate)) * up), gate and up the halves of a row of 2 * width columns.
// Grid: pieces of 8 columns over all rows, 256 threads, a piece each.  Needs: width % 8 == 0.
#include "common.cuh"

__device__ __forceinline__ float silu_exact(float x) { return __fdiv_rn(x, 1.0f + expf(-x)); }

extern "C" __global__ void __launch_bounds__(256) silu_mul(const u16* gate_up, i64 num_rows, int width, u16* out) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const i64 piece = (i64)blockIdx.x * 256 + threadIdx.x;
  const int pieces = width / 8;
  const i64 row = piece / pieces;
  if (row >= num_rows) return;
  const i64 column = (piece - row * pieces) * 8;
  const uint4 g = __ldcs((const uint4*)(gate_up + row * 2 * width + column));
  const uint4 u = __ldcs((const uint4*)(gate_up + row * 2 * width + width + column));
  const u32 gate[4] = {g.x, g.y, g.z, g.w}, up[4] = {u.x, u.y, u.z, u.w};
  u32 made[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 s = pack_bf16(silu_exact(bf16_low(gate[i])), silu_exact(bf16_high(gate[i])));
    made[i] = pack_bf16(__fmul_rn(bf16_low(s), bf16_low(up[i])), __fmul_rn(bf16_high(s), bf16_high(up[i])));
  }
  *(uint4*)(out + row * width + column) = make_uint4(made[0], made[1], made[2], made[3]);
}
