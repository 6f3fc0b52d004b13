// decode.cpp: kernels/decode_attention.cu as a library for ctypes: clusters, each CTA with shared memory of its own.
#include <deque>
#include <vector>

#include "emulated.h"

// A CTA's shared memory; in an address of a cluster's memory the CTA stands above the place in it.
constexpr u32 CTA_BYTES = 1u << 20, CLUSTER_BASE = 1u << 31;
inline u8* memories[8];
inline u8* memory_of_cta() { return memories[cta_in_cluster()]; }
#define ring_memory (memory_of_cta())

inline u32 address_of(const void* p) { return (u32)((const u8*)p - memory_of_cta() + SHARED_BASE); }
template <class T>
T& at_address(u32 address) {
  const bool mapped = address >= CLUSTER_BASE;
  const u32 cta = mapped ? (address - CLUSTER_BASE) / CTA_BYTES : cta_in_cluster();
  const u32 place = mapped ? (address - CLUSTER_BASE) % CTA_BYTES : address - SHARED_BASE;
  if (place % alignof(T) || place >= CTA_BYTES) broken("a bad address in shared memory");
  return *(T*)(memories[cta] + place);
}
inline u32 cluster_rank() { return cta_in_cluster(); }
inline u32 in_cluster(u32 address, u32 rank) { return CLUSTER_BASE + rank * CTA_BYTES + (address - SHARED_BASE); }

inline void barriers_visible() {}
inline u32 key(u32 address) { return address >= CLUSTER_BASE ? address : in_cluster(address, cta_in_cluster()); }
inline void barrier_init(u32 address, u32 count) { init_at(key(address), count); }
inline void barrier_arrive_expect(u32 address, u32 bytes) { expect_at(key(address), bytes); }
inline void barrier_wait(u32 address, u32 parity) { wait_at(key(address), parity); }
inline void store_cluster_async(u32 to, int a, int b, int c, int d, u32 barrier) {
  if (to & 15) broken("a misaligned store to another CTA");
  const int words[4] = {a, b, c, d};
  std::memcpy(&at_address<u8>(to), words, 16);
  barrier_at(barrier).bytes -= 16, settle(barrier_at(barrier));
}
inline Meeting cluster_meeting;
inline u64 cluster_turn_of[MOST_THREADS];
inline int cluster_threads;
inline void cluster_arrive() {
  cluster_turn_of[running] = cluster_meeting.turn;
  if (++cluster_meeting.arrived == cluster_threads) cluster_meeting.arrived = 0, ++cluster_meeting.turn, ++events;
}
inline void cluster_wait() {
  while (cluster_meeting.turn == cluster_turn_of[running]) yield();
}

// Copies of a thread land when it waits for their group, none sooner.
struct Copy {
  u32 to;
  const void* from;
  bool there;
};
inline std::vector<Copy> open_group[MOST_THREADS];
inline std::deque<std::vector<Copy>> groups[MOST_THREADS];
inline void copy_16_or_zeros(u32 to, const void* from, bool there) {
  if (((u64)from | to) & 15) broken("a misaligned copy");
  open_group[running].push_back({to, from, there});
}
inline void copies_commit() { groups[running].push_back(std::move(open_group[running])), open_group[running].clear(); }
template <int PENDING>
void copies_wait() {
  for (auto& mine = groups[running]; mine.size() > PENDING; mine.pop_front())
    for (const Copy& copy : mine.front())
      copy.there ? std::memcpy(&at_address<u8>(copy.to), copy.from, 16) : std::memset(&at_address<u8>(copy.to), 0, 16);
}

template <bool TRANSPOSED>
uint4 matrices(u32 address) {
  if (address & 15) broken("misaligned row of a matrix");
  shown()[lane()][0] = address;
  warp_meets();
  u32 v[4];
  const int g = lane() >> 2, t = lane() & 3;
  for (int m = 0; m < 4; ++m) {
    auto element = [&](int row, int column) { return (u32)at_address<u16>(shown()[8 * m + row][0] + 2 * column); };
    v[m] = TRANSPOSED ? element(2 * t, g) | element(2 * t + 1, g) << 16
                      : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
  warp_meets();
  return {v[0], v[1], v[2], v[3]};
}
inline uint4 load_matrices(u32 address) { return matrices<false>(address); }
inline uint4 load_transposed(u32 address) { return matrices<true>(address); }
inline void mma_bf16(float (&d)[4], uint4 a, u32 b0, u32 b1) {
  auto& s = shown();
  const u32 mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
  for (int i = 0; i < 6; ++i) s[lane()][i] = mine[i];
  warp_meets();
  auto half = [](u64 pair, int k) { return (double)(k & 1 ? bf16_high((u32)pair) : bf16_low((u32)pair)); };
  const int g = lane() >> 2, t = lane() & 3;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i >> 1), column = 2 * t + (i & 1);
    double sum = d[i];
    for (int k = 0; k < 16; ++k)
      sum += half(s[4 * (row & 7) + (k & 7) / 2][(row >= 8) + 2 * (k >= 8)], k) *
             half(s[4 * column + (k & 7) / 2][4 + (k >= 8)], k);
    d[i] = (float)sum;
  }
  warp_meets();
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float fmaxf(float a, float b) { return a != a ? b : b != b ? a : a > b ? a : b; }

#define __cluster_dims__(...)
#define shared_address address_of
#include "decode_attention.cu"

static void new_cluster() {
  barriers_by_address.clear();
  cluster_meeting = {};
  for (u8*& memory : memories) {
    if (!memory) memory = (u8*)std::aligned_alloc(1024, CTA_BYTES);
    std::memset(memory, 0xff, SHARED_BYTES);  // NaN
  }
  for (auto& mine : groups) mine.clear();
}

extern "C" void run(int num_requests, const u16* qkv, const u16* qk_norm, float eps, const float* cos_sin,
                    const i64* positions, const i64* slot_mapping, Kv* k_cache, Kv* v_cache, const int* kv_lens,
                    const int* page_starts, const int* pages, float scale, u16* out) {
  cluster_threads = CTAS * THREADS;
  for (int request = 0; request < num_requests; ++request) {
    blockIdx.y = request;
    launch(CTAS * NUM_KV_HEADS, THREADS, false, new_cluster,
           [=] {
             decode_attention(qkv, qk_norm, eps, cos_sin, positions, slot_mapping, k_cache, v_cache, kv_lens,
                              page_starts, pages, scale, out);
           },
           CTAS);
  }
}
