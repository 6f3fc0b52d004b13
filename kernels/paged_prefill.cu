// paged_prefill.cu: paged_attention.cu for long queries on Hopper: FlashInfer's FA3 template (wgmma, a producer
// warpgroup that gathers pages, Q by the tensor copy engine); 128 query rows of one head a work, no chunks of KV.
// Persistent CTAs, one an SM, each with the list of works that cluster/attention/schedule.py gave it, longest first.
// Needs: HEAD_SIZE 128, sm_90a.  Built by deploy/build_attention.py.
#include <cstdio>

#include "flashinfer/attention/hopper/prefill_sm90.cuh"
#include "flashinfer/attention/hopper/variants.cuh"
#include "paged_attention_call.cuh"

namespace fi = flashinfer;
using bf16 = cutlass::bfloat16_t;

namespace {

struct Params {
  using DTypeQ = bf16;
  using DTypeKV = bf16;
  using DTypeO = bf16;
  using IdType = int32_t;
  bf16 *q_ptr, *k_ptr, *v_ptr, *o_ptr;
  float* lse_ptr;
  int32_t *qo_tile_indices, *qo_indptr, *kv_indptr, *kv_indices, *qo_lens, *kv_lens, *head_indices, *work_indptr,
      *batch_indices;
  struct AdditionalParams {
    float sm_scale;
  } additional_params;
  int64_t q_stride_n, k_stride_n, v_stride_n, o_stride_n, q_stride_h, k_stride_h, v_stride_h, o_stride_h, nnz_qo;
  int64_t k_page_stride, v_page_stride;
  int num_qo_heads, num_kv_heads, page_size, window_left;
};

cudaError_t run(const Fa3Call& call) {
  Params params = {};
  params.q_ptr = static_cast<bf16*>(call.q), params.o_ptr = static_cast<bf16*>(call.o);
  params.k_ptr = static_cast<bf16*>(call.k), params.v_ptr = static_cast<bf16*>(call.v);
  params.q_stride_n = call.q_stride_n, params.q_stride_h = call.q_stride_h;
  params.o_stride_n = call.o_stride_n, params.o_stride_h = call.o_stride_h;
  params.k_stride_n = params.v_stride_n = call.kv_stride_n, params.k_stride_h = params.v_stride_h = call.kv_stride_h;
  params.k_page_stride = params.v_page_stride = call.page_stride;
  params.nnz_qo = call.num_tokens, params.page_size = call.page_size, params.window_left = -1;
  params.num_qo_heads = call.num_heads, params.num_kv_heads = call.num_kv_heads;
  params.work_indptr = call.work_starts, params.head_indices = call.work_head,
  params.qo_tile_indices = call.work_q_tile;
  params.qo_indptr = call.work_q_start, params.kv_indptr = call.work_page_start, params.kv_indices = call.pages;
  params.qo_lens = call.work_q_len, params.kv_lens = call.work_kv_len;
  params.batch_indices = call.work_head;  // read, never used without a custom mask
  params.additional_params.sm_scale = call.scale;
  return fi::BatchPrefillWithPagedKVCacheDispatched<HEAD_SIZE, HEAD_SIZE, fi::MaskMode::kCausal,
                                                    /*LEFT_SLIDING_WINDOW=*/false,
                                                    /*SAME_SCHEDULE_FOR_ALL_HEADS=*/false, fi::StandardAttention>(
      params, /*enable_pdl=*/false, static_cast<cudaStream_t>(call.stream));
}

}  // namespace

// 0, or what went wrong in `message`.
extern "C" int expertmesh_paged_prefill(const Fa3Call* call, char* message, int size) {
  try {
    cudaError_t error = cudaSetDevice(call->device);
    if (!error) error = run(*call);
    if (!error) return 0;
    std::snprintf(message, size, "%s", cudaGetErrorString(error));
    cudaGetLastError();
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
  }
  return 1;
}
