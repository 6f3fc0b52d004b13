// thin_gemm.cuh: y = x @ w^T for at most 8 rows of x: weights stream once from memory into tensor-core fragments.
//
// A warp owns COLUMNS = LOADS * 32 columns of K and goes over groups of 8 rows of w. Lane (g, t) of a warp loads 16
// bytes of row g at columns 8 * t, which are both halves of the B fragments of two m16n8k16 steps once K is read in
// that permuted order; x lies in shared memory in the same order, each warp's part its own, rows ROWS to 15 of A are
// zero. Loads run DEPTH ahead, across groups, and begin before the kernel before this one has ended: weights are
// constant. Registers are few, so that the next kernel is resident, and reads its own first weights, while this one
// ends. The order of a sum depends on K and WARPS alone, so a row's bits depend on neither the number of rows nor on
// its place.
#pragma once
#include "common.cuh"

#ifndef K
#define K 2048
#endif
#ifndef WARPS  // that share K
#define WARPS 8
#endif
#ifndef ROWS  // of x, at most
#define ROWS 8
#endif
#ifndef MAX_DEPTH
#define MAX_DEPTH 8
#endif

constexpr int LOADS = (K / 32 + WARPS - 1) / WARPS;
__device__ constexpr int deepest(int depth) { return LOADS % depth == 0 ? depth : deepest(depth - 1); }
constexpr int DEPTH = deepest(LOADS < MAX_DEPTH ? LOADS : MAX_DEPTH);  // a load finds the place of its own number
constexpr int COLUMNS = LOADS * 32;
static_assert(K % 32 == 0 && LOADS <= 32 && WARPS <= 16 && ROWS <= 8, "thin_gemm.cuh: K, WARPS or ROWS");

__device__ __forceinline__ uint4 load_weights_once(const u16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
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
  static constexpr int X_PIECES = LOADS * ROWS * 4;  // of 16 bytes, of one warp

  const int warp, lane;  // of those that share K
  const u16* from;       // this lane's place in row g of group 0
  uint4* x;              // this warp's [LOADS][ROWS][4]
  uint4 ring[DEPTH];

  __device__ __forceinline__ ThinGemm(int warp, uint4* shared_x)
      : warp(warp), lane(threadIdx.x & 31), x(shared_x + warp * X_PIECES) {}

  // Whether there is such a load at all: K need not fill all warps.
  __device__ __forceinline__ bool inside(int load) const {
    return K % (32 * WARPS) == 0 || warp * COLUMNS + load * 32 < K;
  }
  __device__ __forceinline__ void load(int slot, int group, int load) {
    if (inside(load)) ring[slot] = load_weights_once(from + (i64)group * 8 * K + load * 32);
  }

  // Begin with the weights of the first group; before the inputs are there.
  __device__ __forceinline__ void start(const u16* w, int group) {
    from = w + (i64)(lane >> 2) * K + warp * COLUMNS + (lane & 3) * 8;
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) load(i, group, i);
  }

  // rows [num_rows, K]; those from num_rows on are zero. Seen by this warp alone.
  __device__ __forceinline__ void load_rows(const u16* rows, int num_rows) {
#pragma unroll
    for (int first = 0; first < LOADS * 4; first += 32) {
      const int piece = first + lane;
      uint4 v[ROWS];
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        v[row] = make_uint4(0, 0, 0, 0);
        if (row < num_rows && piece < LOADS * 4 && inside(piece / 4))
          v[row] = *(const uint4*)(rows + (i64)row * K + warp * COLUMNS + piece * 8);
      }
#pragma unroll
      for (int row = 0; row < ROWS; ++row)
        if (piece < LOADS * 4) x[(piece / 4 * ROWS + row) * 4 + piece % 4] = v[row];
    }
    __syncwarp();
  }

  // This warp's part of 8 x 8 sums, into parts[row g][output 2 * t, + 1]; loads of group `next` (< 0: none) begin.
  __device__ __forceinline__ void group_sums(int group, int next, float* parts) {
    const int g = lane >> 2, t = lane & 3;
    float d[2][4] = {};
#pragma unroll 1
    for (int first = 0; first < LOADS; first += DEPTH) {
      const bool ends = first + DEPTH == LOADS;
#pragma unroll
      for (int i = 0; i < DEPTH; ++i) {
        uint4 a = make_uint4(0, 0, 0, 0);
        if (g < ROWS) a = x[((first + i) * ROWS + g) * 4 + t];
        if (inside(first + i)) {
          multiply_8(d[i & 1], a.x, a.y, ring[i].x, ring[i].y);
          multiply_8(d[i & 1], a.z, a.w, ring[i].z, ring[i].w);
        }
        if (!ends)
          load(i, group, first + DEPTH + i);
        else if (next >= 0)
          load(i, next, i);
      }
      if (DEPTH % 2 != 0) {  // even loads to one sum, odd ones to the other, whatever DEPTH is
        const float2 other = make_float2(d[0][0], d[0][1]);
        d[0][0] = d[1][0], d[0][1] = d[1][1], d[1][0] = other.x, d[1][1] = other.y;
      }
    }
    *(float2*)(parts + g * 8 + t * 2) = make_float2(d[0][0] + d[1][0], d[0][1] + d[1][1]);
  }
};
