// thin_linear.cu: y = x @ w^T for 1 to ROWS <= 8 rows, bf16 in, float32 sums, bf16 out: reads w once at the memory's
// rate. Grid: one or two CTAs an SM, each over every gridDim-th group of 8 outputs; the warps of a CTA share K
// (thin_gemm.cuh) and add up through shared memory, two buffers, one barrier a group. Dynamic shared memory: x, WARPS *
// LOADS * ROWS * 64 bytes.  Needs: K % 32 == 0, num_outputs % 8 == 0.
#include "thin_gemm.cuh"

#ifndef RESIDENT  // CTAs that fit an SM by their registers
#define RESIDENT 3
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
    thin_linear(const u16* x, int num_rows, const u16* w, int num_outputs, u16* y) {
  allow_next_kernel();
  extern __shared__ uint4 shared_x[];
  __shared__ float parts[2][WARPS][64];
  const int num_groups = num_outputs / 8, warp = threadIdx.x >> 5;
  ThinGemm gemm(warp, shared_x);
  gemm.start(w, blockIdx.x);
  wait_for_previous_kernel();
  gemm.load_rows(x, num_rows);
  int buffer = 0;
#pragma unroll 1
  for (int group = blockIdx.x; group < num_groups; group += gridDim.x, buffer ^= 1) {
    const int next = group + (int)gridDim.x < num_groups ? group + (int)gridDim.x : -1;
    gemm.group_sums(group, next, parts[buffer][warp]);
    __syncthreads();
    for (int place = threadIdx.x; place < ROWS * 8; place += WARPS * 32) {
      float sum = 0.0f;
#pragma unroll
      for (int from = 0; from < WARPS; ++from) sum += parts[buffer][from][place];
      const int row = place >> 3;
      if (row < num_rows) y[(i64)row * num_outputs + group * 8 + (place & 7)] = (u16)pack_bf16(sum, 0.0f);
    }
  }
}
