// thin_linear.cu: y = x @ w^T for 1 to 8 rows, bf16 in, float32 sums, bf16 out: reads w once at the rate of the memory.
// Grid: two CTAs an SM (one where WARPS > 8), each over every gridDim-th group of 8 outputs; the warps of a CTA share K
// and add up through shared memory, two buffers, one barrier a group.  Needs: K % 32 == 0, num_outputs % 8 == 0.
// Before the rows are there a CTA's first group is in registers and its second as far as the L2.
#include "thin_gemm.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, WARPS > 8 ? 1 : 2)
    thin_linear(const u16* x, int num_rows, const u16* w, int num_outputs, u16* y) {
  allow_next_kernel();
  __shared__ float parts[2][WARPS][64];
  const int num_groups = num_outputs / 8;
  ThinGemm gemm;
  gemm.start(w, blockIdx.x);
  if (blockIdx.x + gridDim.x < num_groups) gemm.prefetch(blockIdx.x + gridDim.x);
  wait_for_previous_kernel();
  gemm.load_rows(x, num_rows);
  int buffer = 0;
#pragma unroll 1
  for (int group = blockIdx.x; group < num_groups; group += gridDim.x, buffer ^= 1) {
    const int next = group + (int)gridDim.x < num_groups ? group + (int)gridDim.x : -1;
    gemm.group_sums(group, next, parts[buffer][threadIdx.x >> 5]);
    __syncthreads();
    if (threadIdx.x < 64) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) sum += parts[buffer][warp][threadIdx.x];
      const int row = threadIdx.x >> 3;
      if (row < num_rows) y[(i64)row * num_outputs + group * 8 + (threadIdx.x & 7)] = (u16)pack_bf16(sum, 0.0f);
    }
  }
}
