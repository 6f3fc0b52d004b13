// thin_gemm.cuh: y = x @ w^T for at most 8 rows of x: weights stream once from memory into tensor-core fragments.
//
// A warp owns COLUMNS = LOADS * 32 columns of K and goes over groups of 8 rows of w. Lane (g, t) of a warp loads 16
// bytes of row g at columns 8 * t, which are both halves of the B fragments of two m16n8k16 steps once K is read in
// that permuted order; x is held in the same order in registers for all groups, rows 8 to 15 of A are zero. Loads run
// DEPTH ahead, across groups, and begin before the kernel before this one has ended: weights are constant. The order of
// a sum depends on K and WARPS alone, so a row's bits depend on neither the number of rows nor on its place.
#pragma once
#include "common.cuh"

#ifndef K
#define K 2048
#endif
#ifndef WARPS
#define WARPS 8
#endif

constexpr int LOADS = (K / 32 + WARPS - 1) / WARPS;
__device__ constexpr int deepest(int depth) { return LOADS % depth == 0 ? depth : deepest(depth - 1); }
constexpr int DEPTH = deepest(LOADS < 8 ? LOADS : 8);  // a load of the next group finds the place of its own number
constexpr int COLUMNS = LOADS * 32;
static_assert(K % 32 == 0 && LOADS <= 8 && WARPS <= 16 && WARPS >= 2, "thin_gemm.cuh: K or WARPS");

// Not `ld.global.nc`: the assembler would move such loads behind the wait for the kernel before, or each to its use.
__device__ __forceinline__ uint4 load_weights_once(const u16* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// d += a (16 x 16, rows 8 to 15 zero) * b (16 x 8); of d, the lane's two values of row g.
__device__ __forceinline__ void multiply_8(float (&d)[4], u32 a0, u32 a2, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b0), "r"(b1));
}

struct ThinGemm {
  const u16* from;  // this lane's place in row g of group 0
  uint4 ring[DEPTH], x[LOADS];

  static __device__ __forceinline__ int column(int load) {  // of this lane
    return (threadIdx.x >> 5) * COLUMNS + load * 32 + (threadIdx.x & 3) * 8;
  }
  // Whether there is such a load at all: K need not fill all warps.
  static __device__ __forceinline__ bool inside(int load) {
    return K % (32 * WARPS) == 0 || (int)(threadIdx.x >> 5) * COLUMNS + load * 32 < K;
  }
  __device__ __forceinline__ void load(int slot, int group, int load) {
    if (inside(load)) ring[slot] = load_weights_once(from + (i64)group * 8 * K + load * 32);
  }

  // Begin with the weights of the first group; before the inputs are there.
  __device__ __forceinline__ void start(const u16* w, int group) {
    from = w + (i64)((threadIdx.x >> 2) & 7) * K + column(0);
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) load(i, group, i);
  }

  // Bring a group's weights as far as the L2.
  __device__ __forceinline__ void prefetch(int group) const {
#pragma unroll
    for (int i = 0; i < LOADS; i += 2)
      if (inside(i)) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + (i64)group * 8 * K + i * 32));
  }

  // x [num_rows, K]; rows from num_rows on are zero.
  __device__ __forceinline__ void load_rows(const u16* rows, int num_rows) {
    const int g = (threadIdx.x >> 2) & 7;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      x[i] = make_uint4(0, 0, 0, 0);
      if (g < num_rows && inside(i)) x[i] = *(const uint4*)(rows + (i64)g * K + column(i));
    }
  }

  // This warp's part of 8 x 8 sums, into parts[row g][output 2 * t, + 1]; loads of group `next` (< 0: none) begin.
  __device__ __forceinline__ void group_sums(int group, int next, float* parts) {
    float d[2][4] = {};
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      if (inside(i)) {
        multiply_8(d[i & 1], x[i].x, x[i].y, ring[i % DEPTH].x, ring[i % DEPTH].y);
        multiply_8(d[i & 1], x[i].z, x[i].w, ring[i % DEPTH].z, ring[i % DEPTH].w);
      }
      if (i + DEPTH < LOADS)
        load((i + DEPTH) % DEPTH, group, i + DEPTH);
      else if (next >= 0)
        load(i % DEPTH, next, i + DEPTH - LOADS);
    }
    const int lane = threadIdx.x & 31;
    *(float2*)(parts + (lane >> 2) * 8 + (lane & 3) * 2) = make_float2(d[0][0] + d[1][0], d[0][1] + d[1][1]);
  }
};
