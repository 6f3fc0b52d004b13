// ring.cuh: a ring of shared-memory slots between warps that copy and warps that compute, for sm_80 and later.
// sm_90 and later: the copy engine moves the bytes and counts them on the slot's barrier.  Before (or with
// -DCP_ASYNC=1, which lets a Hopper card test that path): cp.async, 16 bytes a lane, whose completion arrives on the
// same barrier.
#pragma once
#include "common.cuh"

#ifndef CP_ASYNC
#define CP_ASYNC (__CUDA_ARCH__ < 900)
#endif

// Arrivals that one copying warp makes on a slot's barrier.
constexpr u32 PRODUCER_ARRIVALS = CP_ASYNC ? 32 : 1;

struct Ring {  // position in a ring of `size` slots; the parity flips at each turn
  int slot = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next(int size) {
    if (++slot == size) slot = 0, parity ^= 1;
  }
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u64& barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// The barriers exist for the copy engine too.
__device__ __forceinline__ void barriers_visible() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(u64& barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(&barrier)) : "memory");
}

__device__ __forceinline__ bool barrier_test(u32 barrier, u32 parity) {
  u32 done;
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
#else
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
#endif
  return done;
}

// With -DWATCHDOG a wait of some seconds ends the kernel with an error instead of holding the GPU for ever.
__device__ __forceinline__ void give_up_after(u32& tries, u32 sleep_ns) {
  if (sleep_ns) __nanosleep(sleep_ns);
#if WATCHDOG
  if (++tries > (1u << 22)) __trap();
#endif
}

__device__ __forceinline__ void barrier_wait(u64& barrier, u32 parity) {
  const u32 address = shared_address(&barrier);
  u32 tries = 0;
  while (!barrier_test(address, parity)) give_up_after(tries, __CUDA_ARCH__ >= 900 ? 0 : 20);
}

// Before the copies of a slot, by the whole warp: how many bytes this warp will bring.
__device__ __forceinline__ void expect_bytes(u64& barrier, u32 bytes, int lane) {
#if !CP_ASYNC
  if (lane == 0)
    asm volatile(
        "{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(shared_address(&barrier)),
        "r"(bytes)
        : "memory");
  __syncwarp();
#endif
}

// After them: the barrier hears of each lane's cp.async as they land.
__device__ __forceinline__ void copies_arrive(u64& barrier) {
#if CP_ASYNC
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
#endif
}

__device__ __forceinline__ void copy_16(u32 destination, const u8* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

__device__ __forceinline__ void copy_bulk(u32 destination, const u8* source, u32 bytes, u64& barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(shared_address(&barrier))
      : "memory");
#endif
}

// The same, marked as read once, so that it leaves the L2 before anything that is read again.
__device__ __forceinline__ void copy_bulk_once(u32 destination, const u8* source, u32 bytes, u64& barrier) {
#if __CUDA_ARCH__ >= 900
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(destination),
      "l"(source), "r"(bytes), "r"(shared_address(&barrier)), "l"(policy)
      : "memory");
#endif
}

// Contiguous bytes, whole 16-byte units.
template <bool ONCE>
__device__ __forceinline__ void copy_by_warp(u32 destination, const u8* source, u32 bytes, u64& barrier, int lane) {
#if CP_ASYNC
  for (u32 i = lane * 16; i < bytes; i += 512) copy_16(destination + i, source + i);
#else
  if (lane == 0) {
    if constexpr (ONCE)
      copy_bulk_once(destination, source, bytes, barrier);
    else
      copy_bulk(destination, source, bytes, barrier);
  }
#endif
}

// `bytes` from `offset` of each of `num_rows` <= 32 rows, row r to destination + r * pitch; lane r holds row r's
// source.
__device__ __forceinline__ void copy_rows_by_warp(u32 destination, u32 pitch, const u16* source, u32 offset,
                                                  int num_rows, u32 bytes, u64& barrier, int lane) {
#if CP_ASYNC
  for (int row = 0; row < num_rows; ++row) {
    const u8* from = (const u8*)__shfl_sync(0xffffffffu, (u64)source, row) + offset;
    for (u32 i = lane * 16; i < bytes; i += 512) copy_16(destination + row * pitch + i, from + i);
  }
#else
  if (lane < num_rows) copy_bulk(destination + lane * pitch, (const u8*)source + offset, bytes, barrier);
#endif
}

// Ordinary stores before it are seen by copies that other CTAs issue after `order_copies_after`.
__device__ __forceinline__ void order_before_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}
__device__ __forceinline__ void order_copies_after() { order_before_copies(); }

__device__ __forceinline__ u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void add_release(u32* p, u32 v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --------------------------------------------------------------------------------------------------------- shared
// loads
__device__ __forceinline__ uint4 load_shared_uint4(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ uint2 load_shared_uint2(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ u32 load_shared_u32(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ float load_shared_float(u32 address) { return __uint_as_float(load_shared_u32(address)); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l & 7 of matrix l / 8.
__device__ __forceinline__ uint4 load_matrices(u32 address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

// -----------------------------------------------------------------------------------------------------------
// arithmetic d[16, 8] += a[16, 16] @ b[16, 8], bf16 in, float32 sums.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 add_bf16x2(u32 a, u32 b) {  // a * 1 + b: sm_80 has no other addition
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return d;
}

__device__ __forceinline__ float half_to_float(u16 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

// Transpose an 8x8 matrix of 16-bit elements held as one fragment of a warp.
__device__ __forceinline__ u32 transpose_8x8(u32 fragment) {
  u32 turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(fragment));
  return turned;
}
