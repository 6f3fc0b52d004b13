// paged_attention_e4m3.cuh: e4m3 pages in FlashInfer's FA2 template without a shuffle between lanes.
// Fragments are loaded as 16-bit numbers, so a lane gets the bytes of 4 columns of K side by side, and of V two columns
// side by side of two rows. The template moves them between lanes to where mma wants them: 10 dependent shuffles for 16
// x 16 numbers. But a product does not mind the order of its inner columns, and the result's columns may be put in
// order once at the end: within every 16 columns the even ones come first, then the odd ones. So q is put in that order
// in shared memory, and o taken out of it when it is stored; K and V are widened where they lie.
// `kernels/flashinfer_fixes.py` puts these calls into the template.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

namespace flashinfer::e4m3 {

// A pair whose signs and magnitudes are in place, exponents 120 too low; the product is exact, of subnormals too.
__device__ __forceinline__ uint32_t scaled(uint32_t pair) {
  const __nv_bfloat162 shift = __float2bfloat162_rn(1.329227995784916e36f);  // 2^120
  __nv_bfloat162 value = __hmul2(*reinterpret_cast<__nv_bfloat162*>(&pair), shift);
  return *reinterpret_cast<uint32_t*>(&value);
}

// Bytes 0 and 2, and bytes 1 and 3, as pairs of bf16.
__device__ __forceinline__ uint32_t even(uint32_t word) {
  return scaled((word << 8 & 0x80008000u) | (word << 4 & 0x07f007f0u));
}
__device__ __forceinline__ uint32_t odd(uint32_t word) {
  return scaled((word & 0x80008000u) | (word >> 4 & 0x07f007f0u));
}

// Words of 8 rows of K each: columns 4 t to 4 t + 3 -> inner columns of mma 2 t, 2 t + 1 and 2 t + 8, 2 t + 9.
__device__ __forceinline__ void widen_k(uint32_t (&b)[4], const uint32_t (&words)[2]) {
  b[0] = even(words[0]), b[1] = odd(words[0]), b[2] = even(words[1]), b[3] = odd(words[1]);
}

// Words of rows 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of V, columns 2 c and 2 c + 1 -> column c of two tiles of mma.
__device__ __forceinline__ void widen_v(uint32_t (&b)[4], const uint32_t (&words)[2]) {
  b[0] = even(words[0]), b[1] = even(words[1]), b[2] = odd(words[0]), b[3] = odd(words[1]);
}

// q in shared memory: of every 16 columns first the even ones, then the odd ones. All threads of the CTA.
template <typename KTraits, typename Smem>
__device__ __forceinline__ void sort_columns(const Smem& q, const dim3 tid) {
  constexpr uint32_t GROUPS = KTraits::HEAD_DIM_QK / 16, STRIDE = KTraits::UPCAST_STRIDE_Q;
  const uint32_t thread = tid.x + 32 * (tid.y + KTraits::NUM_WARPS_Q * tid.z);
#pragma unroll
  for (uint32_t i = thread; i < KTraits::CTA_TILE_Q * GROUPS; i += KTraits::NUM_THREADS) {
    const uint32_t row = i / GROUPS, unit = i % GROUPS * 2;
    uint4* first = reinterpret_cast<uint4*>(q.base + Smem::template get_permuted_offset<STRIDE>(row, unit));
    uint4* second = reinterpret_cast<uint4*>(q.base + Smem::template get_permuted_offset<STRIDE>(row, unit + 1));
    const uint4 a = *first, b = *second;
    *first = make_uint4(__byte_perm(a.x, a.y, 0x5410), __byte_perm(a.z, a.w, 0x5410), __byte_perm(b.x, b.y, 0x5410),
                        __byte_perm(b.z, b.w, 0x5410));
    *second = make_uint4(__byte_perm(a.x, a.y, 0x7632), __byte_perm(a.z, a.w, 0x7632), __byte_perm(b.x, b.y, 0x7632),
                         __byte_perm(b.z, b.w, 0x7632));
  }
}

// A warp's 16 x 16 numbers of o, as mma leaves them and rounded, to shared memory in the order of the head.
template <typename KTraits, typename Smem>
__device__ __forceinline__ void store_o(const Smem& o, uint32_t first_row, uint32_t mma_d, const uint32_t (&pairs)[4]) {
  const uint32_t lane = threadIdx.x, t = lane % 4;
#pragma unroll
  for (uint32_t j = 0; j < 2; ++j) {  // rows r and r + 8
    const uint32_t at =
        Smem::template get_permuted_offset<KTraits::UPCAST_STRIDE_O>(first_row + lane / 4 + 8 * j, mma_d * 2 + t / 2);
    reinterpret_cast<uint2*>(o.base + at)[t % 2] =
        make_uint2(__byte_perm(pairs[j], pairs[2 + j], 0x5410), __byte_perm(pairs[j], pairs[2 + j], 0x7632));
  }
  __syncwarp();
}

}  // namespace flashinfer::e4m3
