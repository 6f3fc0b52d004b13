// common.cuh: the few PTX instructions that every kernel here is built from. No CUDA header is needed.
#pragma once
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// The kernel before this one in the stream has finished and its writes are visible. First thing every kernel does.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may become resident; it waits for us by itself.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// What others wrote before they added to `p` is seen, and what this CTA wrote before its last barrier is seen by those
// who add later. A weaker fence than __threadfence(), which orders all of memory for everybody.
__device__ __forceinline__ u32 add_acquire_release(u32* p, u32 v) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}

__device__ __forceinline__ float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats rounded to nearest even; `low` goes to the lower address.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

__device__ __forceinline__ int round_up_8(int n) { return (n + 7) & ~7; }

// Who arrives on a barrier for a warp that has agreed (__syncwarp, or products that the whole warp awaited): its first
// lane. -DEVERY_LANE_ARRIVES=1: each for itself, for racecheck, which knows no order but from the thread that arrived.
#ifndef EVERY_LANE_ARRIVES
#define EVERY_LANE_ARRIVES 0
#endif
constexpr u32 WARP_ARRIVALS = EVERY_LANE_ARRIVES ? 32 : 1;
__device__ __forceinline__ bool arrives(int lane) { return EVERY_LANE_ARRIVES || lane == 0; }

constexpr float E4M3_MAX = 448.0f;

// The scale of a group whose largest magnitude is `peak`; a group of zeros gets 1. NaN and infinity pass through.
__device__ __forceinline__ float fp8_scale(float peak) { return peak == 0.0f ? 1.0f : __fdiv_rn(peak, E4M3_MAX); }

// a * factor + -0: sm_80 has no other product.
__device__ __forceinline__ u32 scale_bf16x2(u32 a, u32 factor) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(factor), "r"(0x80008000u));
  return d;
}

// Two floats to e4m3, nearest even, saturating, NaN stays NaN; `low` goes to the lower address. SOFT_E4M3: without the
// instruction, as before sm_89.
__device__ __forceinline__ u32 soft_e4m3(float x) {
  const u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80u;
  u32 rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return sign | 0x7fu;
  rest = min(rest, __float_as_uint(E4M3_MAX));
  if (rest < __float_as_uint(0.015625f)) return sign | __float2uint_rn(__uint_as_float(rest) * 512.0f);  // subnormal
  rest += 0x7ffffu + (rest >> 20 & 1u);
  return sign | ((rest >> 20) - (120u << 3));
}

__device__ __forceinline__ u16 pack_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890 && !defined(SOFT_E4M3)
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return (u16)(soft_e4m3(low) | soft_e4m3(high) << 8);
#endif
}
