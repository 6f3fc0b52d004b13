// dense.cpp: kernels/dense_fp8.cu, dense_w8a8.cu (MANY) or dense_w8a8_few.cu (FEW) as a library for ctypes.
#include "emulated.h"
#if defined(MANY)
#include "dense_w8a8.cu"
#elif defined(FEW)
#include "dense_w8a8_few.cu"
#else
#include "dense_fp8.cu"
#endif

u8 ring_memory[240 << 10] __attribute__((aligned(1024)));

static void new_cta() {
  barriers_by_address.clear();
  std::memset(ring_memory, 0xff, sizeof ring_memory);  // NaN, in both forms
}

#if defined(MANY)
extern "C" void run(int num_ctas, int backwards, const u8* w, const float* scales, const u8* x, const float* x_scales,
                    int num_rows, u16* y, int num_outputs, i64 capacity, float* partial, u32* counters) {
  launch(num_ctas, THREADS, backwards, new_cta,
         [=] { dense_w8a8(w, scales, x, x_scales, capacity, num_rows, y, num_outputs, partial, counters); });
}
#elif defined(FEW)
extern "C" void run(int num_ctas, int backwards, const u8* w, const float* scales, const u8* x, const float* x_scales,
                    int num_rows, u16* y, int num_outputs) {
  launch(num_ctas, THREADS, backwards, new_cta,
         [=] { dense_w8a8_few(w, scales, x, x_scales, num_rows, y, num_outputs); });
}
#else
extern "C" void run(int num_ctas, int backwards, const u8* w, const float* scales, const u16* x, int num_rows, u16* y,
                    int num_outputs) {
  launch(num_ctas, THREADS, backwards, new_cta, [=] { dense_fp8(w, scales, x, num_rows, y, num_outputs); });
}
#endif
