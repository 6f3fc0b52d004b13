// paged_attention_call.cuh: what Python hands over, field by field as in paged_attention.py (ctypes checks the sizes
// below). Everything with a star lies on the device; all index arrays are int32, all strides count elements.
#pragma once
#include <cstdint>

struct Fa2Call {
  void *q, *o, *k, *v,
      *stream;         // q, o [num_tokens, num_heads, HEAD_SIZE]; k, v [num_blocks, page_size, num_kv_heads, HEAD_SIZE]
  void* partial_o;     // [sum of rows x chunks, num_heads, HEAD_SIZE], null: a single chunk each
  float* partial_lse;  // [sum of rows x chunks, num_heads]
  int32_t *q_starts, *q_lens, *kv_lens;              // [num_requests] first row of q, rows of q, tokens of KV
  int32_t *page_starts, *pages;                      // [num_requests + 1] into pages; block ids
  int32_t *item_request, *item_q_tile, *item_chunk;  // [num_items]
  int32_t *o_starts, *merge_starts;  // [num_requests] first row of partial_o; [num_rows + 1] prefix sums of chunks
  int32_t* chunk_size;               // [1] tokens of KV in a chunk
  int64_t page_stride, kv_stride_n, kv_stride_h;
  int32_t q_stride_n, q_stride_h;
  int32_t num_heads, num_kv_heads, page_size, num_requests, num_items, num_rows, tile_q, num_sms, device, overlap;
  float scale;
  int32_t mma_kv;  // 1: short contexts, more CTAs an SM; else the template's usual share of KV a warp
};

struct Fa3Call {
  void *q, *o, *k, *v, *stream;
  int32_t* pages;
  int32_t* work_starts;  // [num_sms + 1] works of each CTA, in its order
  int32_t *work_head, *work_q_tile, *work_q_start, *work_page_start, *work_q_len, *work_kv_len;  // [num_works]
  int64_t page_stride, kv_stride_n, kv_stride_h, q_stride_n, q_stride_h, o_stride_n, o_stride_h;
  int32_t num_heads, num_kv_heads, page_size, num_tokens, device;
  float scale;
};
static_assert(sizeof(Fa2Call) == 8 * 21 + 4 * 14, "as in paged_attention.py");
static_assert(sizeof(Fa3Call) == 8 * 20 + 4 * 6, "as in paged_attention.py");
