// dense.cpp: kernels/dense_fp8.cu or dense_w8a8.cu (W8A8) as a library for ctypes.
#include "emulated.h"
#ifdef W8A8
#include "dense_w8a8.cu"
#else
#include "dense_fp8.cu"
#endif

u8 ring_memory[240 << 10] __attribute__((aligned(1024)));

static void new_cta() {
  barriers_by_address.clear();
  std::memset(ring_memory, 0xff, sizeof ring_memory);  // NaN, in both forms
}

#ifdef W8A8
extern "C" void run(int num_ctas, int backwards, const u8* w, const float* scales, const u8* x, const float* x_scales,
                    i64 capacity, int num_rows, u16* y, int num_outputs, float* partial, u32* counters) {
  launch(num_ctas, THREADS, backwards, new_cta,
         [=] { dense_w8a8(w, scales, x, x_scales, capacity, num_rows, y, num_outputs, partial, counters); });
}
#else
extern "C" void run(int num_ctas, int backwards, const u8* w, const float* scales, const u16* x, int num_rows, u16* y,
                    int num_outputs, float* partial, u32* counters) {
  launch(num_ctas, THREADS, backwards, new_cta,
         [=] { dense_fp8(w, scales, x, num_rows, y, num_outputs, partial, counters); });
}
#endif
