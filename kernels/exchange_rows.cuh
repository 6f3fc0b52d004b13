// exchange_rows.cuh: what peer_exchange.cu and nccl_pack.cu share: how a warp moves a row, which copy of an expert a
// token goes to, and what is not finite.
#pragma once
#include "common.cuh"

#ifndef HIDDEN
#define HIDDEN 4096
#endif
#ifndef TOP_K
#define TOP_K 8
#endif
#ifndef FLOAT32
#define FLOAT32 0
#endif

constexpr int ROW_BYTES = HIDDEN * (FLOAT32 ? 4 : 2), PIECES = ROW_BYTES / 16;
constexpr int LOADS = 4, CHUNKS = (PIECES + 32 * LOADS - 1) / (32 * LOADS);  // a unit: 32 lanes x LOADS pieces
constexpr int TABLE_WIDTH = 8;

struct Place {
  int owner, slot;  // -1 none
};

// Where pair (token, id) goes by the table of copies [layers][num_logical][TABLE_WIDTH]: their number, then owner << 16
// | slot of each.
__device__ __forceinline__ Place place_of(const int* table, int num_logical, int layer, u32 key_shift, int token,
                                          int id) {
  if ((u32)id >= (u32)num_logical) return {-1, -1};
  const int* copies = table + ((i64)layer * num_logical + id) * TABLE_WIDTH;
  const int count = __ldg(copies);
  if (count <= 0) return {-1, -1};
  const int place = __ldg(copies + 1 + (key_shift + token + id) % count);
  return {place >> 16, place & 0xffff};
}

__device__ __forceinline__ bool has_non_finite(uint4 v) {
  const u32 word[4] = {v.x, v.y, v.z, v.w};
  bool found = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    found |= (word[i] & 0x7f800000u) == 0x7f800000u;
#if !FLOAT32
    found |= (word[i] & 0x7f80u) == 0x7f80u;
#endif
  }
  return found;
}

// A unit of a row, between registers and memory.
struct Unit {
  uint4 piece[LOADS];

  __device__ __forceinline__ static bool inside(int chunk, int i) {
    return chunk * LOADS * 32 + i * 32 + (int)(threadIdx.x & 31) < PIECES;
  }
  __device__ __forceinline__ static i64 at(int chunk) { return chunk * LOADS * 32 + (threadIdx.x & 31); }
  __device__ __forceinline__ void load(const u8* row, int chunk) {
    const uint4* from = (const uint4*)row + at(chunk);
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (inside(chunk, i)) piece[i] = __ldg(from + i * 32);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) piece[i] = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void store(u8* row, int chunk) const {
    uint4* to = (uint4*)row + at(chunk);
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (inside(chunk, i)) to[i * 32] = piece[i];
  }
  __device__ __forceinline__ bool is_sick(int chunk) const {
    bool sick = false;
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (inside(chunk, i)) sick |= has_non_finite(piece[i]);
    return sick;
  }
};
