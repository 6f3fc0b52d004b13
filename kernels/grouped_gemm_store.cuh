// grouped_gemm_store.cuh: what becomes of a tile's accumulators.  Part of grouped_gemm.cu.
// w13: SwiGLU, rounded (FP8: quantised per 64 outputs), to the packed rows that w2 reads; then the rows' counter goes
// up. w2: bf16 rows of y, each at its pair's place. Few rows: straight from registers.  STAGED: through chunks of 64
// rows in shared memory that a warp of its own drains, so that the warpgroups go on multiplying: 16 bytes a lane, since
// a bulk store for each row costs more to issue than the row to copy.
#pragma once

// The fragment of 8 outputs x 8 rows that starts at row 8 j: SwiGLU of gate (first 8 rows of the pair) and up, as bf16.
__device__ __forceinline__ u32 swiglu_fragment(const float* a) {
  return pack_bf16(silu(a[0]) * a[2], silu(a[1]) * a[3]);
}

__device__ __forceinline__ Ring next_chunk(Ring& chunks) {
  const Ring now = chunks;
  barrier_wait(at(barriers.chunk_empty[now.slot]), now.parity ^ 1);
  chunks.next(CHUNK_SLOTS);
  return now;
}

__device__ __forceinline__ void chunk_written(const Ring& now, int lane) {
  fence_async_proxy_shared();
  __syncwarp();
  if (arrives(lane)) barrier_arrive(at(barriers.chunk_full[now.slot]));
}

__device__ __forceinline__ void rows_ready(const Tile& tile, const Outputs& out) {
  fence_async_proxy();
  named_barrier(1, CONSUMERS);
  if (threadIdx.x == 128) add_release(out.ready + tile.entry, 1);
}

#if !FP8
template <int N>
__device__ __forceinline__ void store_swiglu(float (&acc)[N / 2], const Tile& tile, int group, Ring& chunks,
                                             const Outputs& out) {
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, row_in_group = lane >> 2;
  if constexpr (!STAGED) {
    const int output = tile.m_tile * (M_ROWS / 2) + group * 32 + warp * 8, piece = output % 64 / 8;
    u8* base = out.h + ((i64)(output / 64) * out.capacity + tile.first_row) * 128 + (lane & 3) * 4;
    if (M_ROWS >= 64 || warp * 16 < M_ROWS) {
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const u32 pair = transpose_8x8(swiglu_fragment(acc + 4 * j));
        const int row = j * 8 + row_in_group;
        if (row < tile.num_rows) *(u32*)(base + row * 128 + ((piece ^ row_in_group) << 4)) = pair;
      }
    }
    rows_ready(tile, out);
  } else {
    const int piece = group * 4 + warp;
#pragma unroll
    for (int c = 0; c < (N + CHUNK_ROWS - 1) / CHUNK_ROWS; ++c) {
      if (c * CHUNK_ROWS >= tile.num_rows) break;
      const Ring now = next_chunk(chunks);
#pragma unroll
      for (int j = c * 8; j < c * 8 + 8 && j < N / 8; j += 4) {
        u32 f[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) f[i] = j + i < N / 8 ? swiglu_fragment(acc + 4 * (j + i < N / 8 ? j + i : 0)) : 0;
        const int row = (j - c * 8) * 8 + lane;
        store_transposed(chunk(now.slot) + row * 128 + ((piece ^ (lane & 7)) << 4), f[0], f[1], f[2], f[3]);
      }
      chunk_written(now, lane);
    }
  }
}
#else
// A CTA's 64 outputs are one group: its peak is taken over both warpgroups.
template <int N>
__device__ __forceinline__ void store_swiglu(float (&acc)[N / 2], const Tile& tile, int group, Ring& chunks,
                                             const Outputs& out) {
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, row_in_group = lane >> 2;
  float* peak_line = peaks[group * 4 + warp];
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    acc[4 * j] = silu(acc[4 * j]) * acc[4 * j + 2];
    acc[4 * j + 1] = silu(acc[4 * j + 1]) * acc[4 * j + 3];
    float p0 = fabsf(acc[4 * j]), p1 = fabsf(acc[4 * j + 1]);
#pragma unroll
    for (int d = 4; d < 32; d <<= 1) {
      p0 = fmaxf(p0, __shfl_xor_sync(0xffffffffu, p0, d));
      p1 = fmaxf(p1, __shfl_xor_sync(0xffffffffu, p1, d));
    }
    if (lane < 4) *(float2*)(peak_line + j * 8 + lane * 2) = make_float2(p0, p1);
  }
  named_barrier(1, CONSUMERS);
  for (int row = threadIdx.x - 128; row < N; row += CONSUMERS) {
    float peak = 0.0f;
#pragma unroll
    for (int w = 0; w < 8; ++w) peak = fmaxf(peak, peaks[w][row]);
    const float scale = fp8_scale(peak);
    tile_scales[row] = __frcp_rn(scale);
    if (row < tile.num_rows) out.h_scales[(i64)tile.m_tile * out.capacity + tile.first_row + row] = scale;
  }
  named_barrier(1, CONSUMERS);
  // Lane l: the e4m3 bytes of outputs 2 (l & 3) and the next one, for row 8 j + l / 4.
  auto quantized = [&](int j) {
    const float2 s = *(const float2*)(tile_scales + j * 8 + (lane & 3) * 2);
    const u32 q = pack_e4m3(acc[4 * j] * s.x, acc[4 * j + 1] * s.y);
    const u32 pair = transpose_8x8((q & 0xff) | (q & 0xff00) << 8);
    return (u16)(pair | pair >> 8);
  };
  const int byte = (group * 4 + warp) * 8, piece = byte >> 4, within = (byte & 8) + (lane & 3) * 2;
  if constexpr (!STAGED) {
    const int shifted = (tile.m_tile & 1) * 4 + piece;
    u8* base = out.h + ((i64)(tile.m_tile >> 1) * out.capacity + tile.first_row) * 128 + within;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const u16 pair = quantized(j);
      const int row = j * 8 + row_in_group;
      if (row < tile.num_rows) *(u16*)(base + row * 128 + ((shifted ^ row_in_group) << 4)) = pair;
    }
    rows_ready(tile, out);
  } else {                // a row's 64 bytes are one half of its swizzled 128, which half is drain_chunks' business
    fence_async_proxy();  // the scales
#pragma unroll
    for (int c = 0; c < (N + CHUNK_ROWS - 1) / CHUNK_ROWS; ++c) {
      if (c * CHUNK_ROWS >= tile.num_rows) break;
      const Ring now = next_chunk(chunks);
      const u32 base = chunk(now.slot) + row_in_group * CHUNK_PITCH_FP8 + ((piece ^ (row_in_group & 3)) << 4) + within;
#pragma unroll
      for (int j = c * 8; j < c * 8 + 8 && j < N / 8; ++j) {
        const u16 pair = quantized(j);
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(base + (j - c * 8) * 8 * CHUNK_PITCH_FP8), "h"(pair) : "memory");
      }
      chunk_written(now, lane);
    }
  }
}
#endif

// A warp's 16 outputs are 32 bytes of a row of y.
template <int N>
__device__ __forceinline__ void store_rows(float (&acc)[N / 2], const Tile& tile, int group, Ring& chunks,
                                           const Outputs& out) {
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, row_in_group = lane >> 2;
  if constexpr (!STAGED) {
    if (M_ROWS < 64 && warp * 16 >= M_ROWS) return;
    u16* base = out.y + tile.m_tile * M_ROWS + group * 64 + warp * 16 + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const int row = j * 8 + row_in_group;
      const int pair = row < tile.num_rows ? __ldg(out.pair_of_row + tile.first_row + row) : -1;
      const u32 low = transpose_8x8(pack_bf16(acc[4 * j], acc[4 * j + 1]));
      const u32 high = transpose_8x8(pack_bf16(acc[4 * j + 2], acc[4 * j + 3]));
      if (pair >= 0) {
        *(u32*)(base + (i64)pair * HIDDEN) = low;
        *(u32*)(base + (i64)pair * HIDDEN + 8) = high;
      }
    }
  } else {
#pragma unroll
    for (int c = 0; c < (N + CHUNK_ROWS - 1) / CHUNK_ROWS; ++c) {
      if (c * CHUNK_ROWS >= tile.num_rows) break;
      const Ring now = next_chunk(chunks);
      const u32 base = chunk(now.slot) + lane * CHUNK_PITCH + group * 128 + warp * 32;
#pragma unroll
      for (int j = c * 8; j < c * 8 + 8 && j < N / 8; j += 4) {
        u32 low[4] = {}, high[4] = {};
#pragma unroll
        for (int i = 0; i < 4 && j + i < N / 8; ++i) {
          low[i] = pack_bf16(acc[4 * (j + i)], acc[4 * (j + i) + 1]);
          high[i] = pack_bf16(acc[4 * (j + i) + 2], acc[4 * (j + i) + 3]);
        }
        const u32 address = base + (j - c * 8) * 8 * CHUNK_PITCH;
        store_transposed(address, low[0], low[1], low[2], low[3]);
        store_transposed(address + 16, high[0], high[1], high[2], high[3]);
      }
      chunk_written(now, lane);
    }
  }
}

// One warp: a chunk of w2's rows, 256 bytes each, to their pairs' places; `pairs`: of rows `lane` and `lane` + 32.
__device__ __forceinline__ void drain_outputs(u32 from, const int (&pairs)[2], int m_tile, int rows, int lane,
                                              const Outputs& out) {
  const int piece = lane & 15;
  u16* to = out.y + m_tile * 128 + piece * 8;
  const u32 source = from + (lane >> 4) * CHUNK_PITCH + piece * 16;
#pragma unroll 1
  for (int first = 0; first < rows; first += 4) {  // 4 rows by 2 loads of 2
    const int near = first < 32 ? pairs[0] : pairs[1];
    uint4 v[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] = load_shared_16(source + (first + 2 * i) * CHUNK_PITCH);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = __shfl_sync(0xffffffffu, near, (first + 2 * i + (lane >> 4)) & 31);
      if (pair >= 0) *(uint4*)(to + (i64)pair * HIDDEN) = v[i];
    }
  }
}

// One warp: a chunk of SwiGLU rows as e4m3, 64 bytes each, which half of the swizzled 128 depends on the row.
__device__ __forceinline__ void drain_quantized(u32 from, const Tile& tile, int first, int rows, int lane,
                                                const Outputs& out) {
  const i64 row_0 = tile.first_row + first;
  u8* to = out.h + ((i64)(tile.m_tile >> 1) * out.capacity + row_0) * 128 + (lane & 3) * 16;
#pragma unroll 1
  for (int row = lane >> 2; row < rows; row += 8)
    *(uint4*)(to + row * 128 + ((tile.m_tile ^ row >> 2) & 1) * 64) =
        load_shared_16(from + row * CHUNK_PITCH_FP8 + (lane & 3) * 16);
  if (ROWS_WIDE && lane * 4 < rows)  // rows are padded to 8
    *(uint4*)(out.h_scales + tile.m_tile * out.capacity + row_0 + lane * 4) =
        load_shared_16(from + CHUNK_SCALES + lane * 16);
}

// STAGED, one warp: chunks leave for memory while the next ones are computed.
__device__ __forceinline__ void drain_chunks(int lane, const Outputs& out) {
  Ring q, chunks;
  while (true) {
    const Tile tile = next_tile<true>(q);
    if (tile.expert < 0) break;
    for (int first = 0; first < tile.num_rows; first += CHUNK_ROWS, chunks.next(CHUNK_SLOTS)) {
      const int rows = min(CHUNK_ROWS, tile.num_rows - first);
      int pairs[2] = {-1, -1};
      if (tile.second) {
        if (lane < rows) pairs[0] = __ldg(out.pair_of_row + tile.first_row + first + lane);
        if (lane + 32 < rows) pairs[1] = __ldg(out.pair_of_row + tile.first_row + first + lane + 32);
      }
      barrier_wait(at(barriers.chunk_full[chunks.slot]), chunks.parity);
      const u32 from = chunk(chunks.slot);
      if (tile.second) {
        drain_outputs(from, pairs, tile.m_tile, rows, lane, out);
      } else if (FP8) {
        drain_quantized(from, tile, first, rows, lane, out);
      } else if (lane == 0) {
        bulk_store(out.h + ((i64)tile.m_tile * out.capacity + tile.first_row + first) * 128, from,
                   round_up_8(rows) * 128);
        bulk_store_commit();
        bulk_store_wait_read();
      }
      __syncwarp();
      if (arrives(lane)) barrier_arrive(at(barriers.chunk_empty[chunks.slot]));
    }
    if (!tile.second) {
      bulk_store_wait_all();
      fence_async_proxy();  // the rows are read by the copy engine
      __syncwarp();
      if (lane == 0) add_release(out.ready + tile.entry, 1);
    }
  }
}
