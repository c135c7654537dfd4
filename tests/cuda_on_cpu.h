// What the package's CUDA kernels take from CUDA, for one processor thread: each of a block's threads is a fibre, and at a
// gate the others go on until all have come. Fragments are those of the hardware, for T = _Float16.
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

struct Index { unsigned x, y; };
Index threadIdx, blockIdx, blockDim, gridDim;
ucontext_t home, fibres[1024];
int current, alive, remaining;
std::function<void()> kernel_call;
void switch_warp();

struct Gate {
  int size = 32, here = 0, turn = 0;
  void wait() {
    const int mine = turn;
    if (++here == size) { here = 0; turn++; return; }
    while (turn == mine) {
      const int from = current;
      threadIdx.x = current = (current + 1) % alive;
      switch_warp();
      if (current != from) swapcontext(&fibres[from], &fibres[current]);
    }
  }
};
struct Warp { Gate gate; float number[32]; const void* row[32]; unsigned a[32][4], b[32][2]; };
std::vector<std::unique_ptr<Warp>> warps;
Warp* warp;
Gate block_gate;
void switch_warp() { warp = warps[current / 32].get(); }

struct Copy { void* to; const void* from; bool there; };
std::vector<Copy> copies[1024];
std::deque<std::vector<Copy>> groups[1024];

void fibre() {
  kernel_call();
  block_gate.wait();
  if (--remaining == 0) setcontext(&home);
  for (Gate never{1 << 30};;) never.wait();
}

void run_blocks(unsigned columns, unsigned rows, int threads, std::function<void()> call) {
  constexpr size_t stack = 1 << 16;
  std::vector<char> stacks(threads * stack);
  kernel_call = call;
  gridDim = {columns, rows};
  blockDim = {(unsigned)threads, 1};
  block_gate.size = alive = threads;
  for (int w = 0; w < (threads + 31) / 32; w++) warps.push_back(std::make_unique<Warp>());
  for (unsigned b = 0; b < columns * rows; b++) {
    blockIdx = {b % columns, b / columns};
    remaining = threads;
    for (int t = 0; t < threads; t++) {
      copies[t].clear();
      groups[t].clear();
      getcontext(&fibres[t]);
      fibres[t].uc_stack.ss_sp = stacks.data() + t * stack;
      fibres[t].uc_stack.ss_size = stack;
      makecontext(&fibres[t], fibre, 0);
    }
    threadIdx.x = current = 0;
    switch_warp();
    swapcontext(&home, &fibres[0]);
  }
}

#define __device__
inline void __syncthreads() { block_gate.wait(); }
inline float __sinf(float x) { return std::sin(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int lane() { return current % 32; }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  warp->number[lane()] = value;
  warp->gate.wait();
  const float other = warp->number[lane() ^ mask];
  warp->gate.wait();
  return other;
}
inline void copy_async(void* to, const void* from, bool there) { copies[current].push_back({to, from, there}); }
inline void close_group() {
  groups[current].push_back(std::move(copies[current]));
  copies[current].clear();
}
template <int OPEN>
inline void wait_groups() {
  for (auto& own = groups[current]; own.size() > OPEN; own.pop_front()) {
    for (const Copy& copy : own.front()) {
      if (copy.there) memcpy(copy.to, copy.from, 16);
      else memset(copy.to, 0, 16);
    }
  }
}

inline void load_fragments(unsigned (&r)[4], const void* row) {
  warp->row[lane()] = row;
  warp->gate.wait();
  for (int i = 0; i < 4; i++) memcpy(&r[i], (const char*)warp->row[8 * i + lane() / 4] + 4 * (lane() % 4), 4);
  warp->gate.wait();
}
inline void load_transposed(unsigned (&r)[4], const void* row) {
  warp->row[lane()] = row;
  warp->gate.wait();
  for (int i = 0; i < 4; i++) {
    for (int e = 0; e < 2; e++) {
      const char* from = (const char*)warp->row[8 * i + 2 * (lane() % 4) + e];
      memcpy((char*)&r[i] + 2 * e, from + 2 * (lane() / 4), 2);
    }
  }
  warp->gate.wait();
}
inline float half_of(unsigned pair, int which) {
  _Float16 value;
  memcpy(&value, (char*)&pair + 2 * which, 2);
  return value;
}
inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const _Float16*) {
  memcpy(warp->a[lane()], a, 16);
  warp->b[lane()][0] = b0;
  warp->b[lane()][1] = b1;
  warp->gate.wait();
  for (int e = 0; e < 4; e++) {
    const int row = lane() / 4, column = 2 * (lane() % 4) + e % 2;
    for (int k = 0; k < 16; k++) {
      const unsigned x = warp->a[4 * row + k % 8 / 2][k / 8 * 2 + e / 2], y = warp->b[4 * column + k % 8 / 2][k / 8];
      c[e] += half_of(x, k % 2) * half_of(y, k % 2);
    }
  }
  warp->gate.wait();
}
