// paged_attention.cu: o[t] = softmax(scale * q[t] k^T) v over the pages of t's sequence, causal; bf16, fp32 accumulate.
// With KV_FP8 pages hold e4m3 numbers, which become bf16 between shared memory and the products: exactly, so the result
// is that of bf16 pages with those values.
// The kernels are FlashInfer's FA2 template (its headers, pinned; compiled by nvcc ahead of time, never by NVRTC): one
// CTA takes an item (request, query tile, KV chunk) of one KV head, a query tile being TILE_Q rows of (token, head of
// group). The list of items is ours (cluster/attention/schedule.py), hence the Params below: lengths and starts are
// read from arrays of the schedule, so that requests may lie anywhere in q, rows of the block table may have any pitch,
// and padding is a request without KV. With several chunks a second kernel, ours, adds them up.
// Needs: HEAD_SIZE 64 or 128, at most 128 heads a KV head, sm_80 or newer.  Built by deploy/build_attention.py.
#include <cstdio>

#include "paged_attention_e4m3.cuh"
// before the template, which calls it
#include "flashinfer/attention/prefill.cuh"
#include "paged_attention_call.cuh"

#ifndef KV_FP8
#define KV_FP8 0
#endif

namespace fi = flashinfer;
using bf16 = __nv_bfloat16;
using Kv = std::conditional_t<KV_FP8, __nv_fp8_e4m3, bf16>;

namespace {

struct Params {
  using DTypeQ = bf16;
  using DTypeKV = Kv;
  using DTypeO = bf16;
  using IdType = int32_t;
  bf16* q;
  fi::paged_kv_t<Kv, int32_t> paged_kv;
  int32_t* q_indptr;
  bf16* o;
  float* lse;
  fi::uint_fastdiv group_size;
  float sm_scale;
  uint32_t num_qo_heads;
  int32_t q_stride_n, q_stride_h, window_left;
  int32_t *request_indices, *qo_tile_indices, *kv_tile_indices, *merge_indptr, *o_indptr;
  bool* block_valid_mask;
  int32_t* kv_chunk_size_ptr;
  uint32_t max_total_num_rows;
  uint32_t* total_num_rows;
  uint32_t padded_batch_size;
  bool partition_kv;
  const int32_t *q_lens, *kv_lens;

  __host__ __device__ __forceinline__ uint32_t get_qo_len(uint32_t request) const { return q_lens[request]; }
  __host__ __device__ __forceinline__ uint32_t get_kv_len(uint32_t request) const { return kv_lens[request]; }
};

using Word = std::conditional_t<HEAD_SIZE == 128, uint2, uint32_t>;  // a lane's part of a head

using Variant =
    fi::DefaultAttention</*custom_mask=*/false, /*sliding_window=*/false, /*soft_cap=*/false, /*alibi=*/false>;

// KV positions a warp takes at a time, in 16s: what was asked for, if two CTAs an SM have room and the template allows
// it (four warps that load rows of bytes together need two).
template <uint32_t TILE_Q, uint32_t WANTED>
constexpr uint32_t mma_kv() {
  constexpr uint32_t room = (SHARED_KIB_PER_SM * 1024 / 2 - TILE_Q * HEAD_SIZE * 2) / (2 * HEAD_SIZE * 16 * sizeof(Kv));
  constexpr uint32_t by_shared = room / fi::get_num_warps_kv(TILE_Q);
  constexpr uint32_t least = HEAD_SIZE == 64 || (KV_FP8 && TILE_Q > 16) ? 2 : 1;
  constexpr uint32_t most = by_shared < WANTED ? by_shared : WANTED;
  return most >= 4 ? 4 : most >= 2 ? 2 : least;
}

template <typename Kernel, typename... Arguments>
cudaError_t launch(const Fa2Call& call, Kernel kernel, dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(call.stream);
  config.attrs = &overlap, config.numAttrs = call.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <uint32_t TILE_Q, uint32_t WANTED>
cudaError_t attend(const Fa2Call& call, Params params) {
  constexpr uint32_t WARPS_Q = fi::get_num_warps_q(TILE_Q), WARPS_KV = fi::get_num_warps_kv(TILE_Q);
  using Traits = fi::KernelTraits<fi::MaskMode::kCausal, TILE_Q, fi::get_num_mma_q(TILE_Q), mma_kv<TILE_Q, WANTED>(),
                                  HEAD_SIZE / 16, HEAD_SIZE / 16, WARPS_Q, WARPS_KV, fi::PosEncodingMode::kNone, bf16,
                                  Kv, bf16, float, int32_t, Variant>;
  static_assert(!Traits::IsInvalid());
  auto kernel = fi::BatchPrefillWithPagedKVCacheKernel<Traits, Params>;
  constexpr size_t shared = sizeof(typename Traits::SharedStorage);
  static cudaError_t allowed[64];  // 0 = not asked yet on this device, else 1 + the answer
  cudaError_t& answer = allowed[call.device & 63];
  if (!answer) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error) return error;
    answer = static_cast<cudaError_t>(1);
  }
  return launch(call, kernel, dim3(call.num_items, 1, call.num_kv_heads), dim3(32, WARPS_Q, WARPS_KV), shared, params);
}

// o[row, head] = sum over chunks of 2^(lse - largest lse) * partial_o, over the sum of the factors. One CTA a row and
// head; warp w adds chunks w, w + 4, ... in order, then the warps are added in order: a chunk that sees nothing (lse
// -inf) adds zeros, so a row's bits do not depend on how many of them follow. Rows without chunks are another call's.
template <int WARPS = 4>
__global__ void __launch_bounds__(WARPS * 32)
    merge_chunks(const bf16* __restrict__ partial_o, const float* __restrict__ partial_lse,
                 const int32_t* __restrict__ starts, bf16* __restrict__ o, int heads) {
  constexpr int VEC = HEAD_SIZE / 32;
  __shared__ float sums[WARPS][HEAD_SIZE + 1], peaks[WARPS];
  const int row = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = starts[row], end = starts[row + 1];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (begin == end) return;
  float peak = -INFINITY;
  for (int64_t c = begin + threadIdx.x; c < end; c += WARPS * 32) peak = fmaxf(peak, partial_lse[c * heads + head]);
#pragma unroll
  for (int i = 16; i; i /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, i));
  if (!lane) peaks[warp] = peak;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, peaks[w]);
  float sum[VEC] = {}, total = 0;
#pragma unroll 4
  for (int64_t c = begin + warp; c < end; c += WARPS) {
    const float lse = partial_lse[c * heads + head];
    const float factor = lse == -INFINITY ? 0.f : exp2f(lse - peak);
    bf16 part[VEC];
    *reinterpret_cast<Word*>(part) =
        *reinterpret_cast<const Word*>(partial_o + (c * heads + head) * HEAD_SIZE + lane * VEC);
    total += factor;
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] = __fmaf_rn(factor, __bfloat162float(part[i]), sum[i]);
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) sums[warp][lane * VEC + i] = sum[i];
  if (!lane) sums[warp][HEAD_SIZE] = total;
  __syncthreads();
  for (int d = threadIdx.x; d < HEAD_SIZE; d += WARPS * 32) {
    float value = 0, all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) value += sums[w][d], all += sums[w][HEAD_SIZE];
    o[(static_cast<int64_t>(row) * heads + head) * HEAD_SIZE + d] =
        __float2bfloat16(all > 0 ? __fdiv_rn(value, all) : 0.f);
  }
}

cudaError_t merge(const Fa2Call& call) {
  return launch(call, merge_chunks<>, dim3(call.num_rows, call.num_heads), dim3(128), 0,
                static_cast<const bf16*>(call.partial_o), static_cast<const float*>(call.partial_lse),
                static_cast<const int32_t*>(call.merge_starts), static_cast<bf16*>(call.o), call.num_heads);
}

cudaError_t run(const Fa2Call& call) {
  if (!call.num_items) return cudaSuccess;
  const bool split = call.partial_o != nullptr;
  Params params = {};
  params.q = static_cast<bf16*>(call.q);
  const int64_t strides[3] = {call.page_stride, call.kv_stride_n, call.kv_stride_h};
  params.paged_kv = fi::paged_kv_t<Kv, int32_t>(call.num_kv_heads, call.page_size, HEAD_SIZE, call.num_requests,
                                                fi::QKVLayout::kNHD, static_cast<Kv*>(call.k), static_cast<Kv*>(call.v),
                                                strides, call.pages, call.page_starts, nullptr);
  params.q_indptr = call.q_starts, params.q_lens = call.q_lens, params.kv_lens = call.kv_lens;
  params.o = static_cast<bf16*>(split ? call.partial_o : call.o);
  params.lse = split ? call.partial_lse : nullptr;
  params.group_size = fi::uint_fastdiv(call.num_heads / call.num_kv_heads);
  params.sm_scale = call.scale, params.num_qo_heads = call.num_heads;
  params.q_stride_n = call.q_stride_n, params.q_stride_h = call.q_stride_h, params.window_left = -1;
  params.request_indices = call.item_request, params.qo_tile_indices = call.item_q_tile;
  params.kv_tile_indices = call.item_chunk, params.o_indptr = split ? call.o_starts : call.q_starts;
  params.kv_chunk_size_ptr = call.chunk_size, params.partition_kv = split;
  cudaError_t error;
  switch (call.tile_q) {
    case 16:
      error = call.mma_kv > 1 ? attend<16, 2>(call, params) : attend<16, 1>(call, params);
      break;
    case 64:
      error = call.mma_kv > 1 ? attend<64, 4>(call, params) : attend<64, 1>(call, params);
      break;
    default:
      error = attend<128, KV_FP8 ? 2 : 4>(call, params);  // 4 would spill registers
  }
  return error || !split ? error : merge(call);
}

}  // namespace

// 0, or what went wrong in `message`.
extern "C" int expertmesh_paged_attention(const Fa2Call* call, char* message, int size) {
  const char* text = "";
  try {
    cudaError_t error = cudaSetDevice(call->device);
    if (!error) error = run(*call);
    if (!error) return 0;
    text = cudaGetErrorString(error);
    cudaGetLastError();  // not left behind for whoever asks next
    std::snprintf(message, size, "%s", text);
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
  }
  return 1;
}
