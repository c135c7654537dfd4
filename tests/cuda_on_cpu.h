// What the package's CUDA kernels take from CUDA, for one processor thread: each of a block's threads is a fibre, and at a
// gate the others go on until all have come. Fragments are those of the hardware, for T = _Float16.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

struct Index { unsigned x, y; };
Index threadIdx, blockIdx, blockDim, gridDim;
unsigned char* memory;
ucontext_t home;
std::vector<ucontext_t> fibres;
int current, remaining;
std::function<void()> kernel_call;
void enter(int fibre);

// Who waits lets the next thread of its block go on: a block runs ahead of the others as far as it can.
struct Gate {
  int size = 32, here = 0, turn = 0;
  bool of_blocks = false;
  void wait() {
    const int mine = turn, threads = blockDim.x;
    if (++here == size) { here = 0; turn++; return; }
    while (turn == mine) {
      const int from = current, place = from % threads;
      enter(of_blocks ? (from + threads) % fibres.size() : from - place + (place + 1) % threads);
      if (current != from) swapcontext(&fibres[from], &fibres[current]);
    }
  }
};
struct Warp { Gate gate; float number[32]; const void* row[32]; unsigned a[32][4], b[32][2]; };
struct Threads {
  Gate gate;
  Index index;
  std::vector<unsigned char> shared;
  std::vector<std::unique_ptr<Warp>> warps;
};
std::vector<Threads> blocks;
Threads* block;
Warp* warp;
Gate gate_of_all;

struct Copy { void* to; const void* from; bool there; };
std::vector<std::vector<Copy>> copies;
std::vector<std::deque<std::vector<Copy>>> groups;

void enter(int fibre) {
  current = fibre;
  block = &blocks[fibre / blockDim.x];
  blockIdx = block->index;
  threadIdx.x = fibre % blockDim.x;
  warp = block->warps[threadIdx.x / 32].get();
  memory = block->shared.data() + (128 - (size_t)block->shared.data() % 128);
}

void fibre() {
  kernel_call();
  block->gate.wait();
  if (--remaining == 0) setcontext(&home);
  for (;;) {
    const int from = current;
    enter((from + 1) % fibres.size());
    swapcontext(&fibres[from], &fibres[current]);
  }
}

// All of them at a time, or one after the other.
void run_blocks(unsigned columns, unsigned rows, int threads, int shared, bool together, std::function<void()> call) {
  constexpr size_t stack = 1 << 16;
  const unsigned all = columns * rows, at_a_time = together ? all : 1;
  std::vector<char> stacks(at_a_time * threads * stack);
  kernel_call = call;
  gridDim = {columns, rows};
  blockDim = {(unsigned)threads, 1};
  blocks.resize(at_a_time);
  fibres.resize(at_a_time * threads);
  copies.resize(fibres.size());
  groups.resize(fibres.size());
  gate_of_all.size = at_a_time;
  gate_of_all.of_blocks = true;
  for (Threads& each : blocks) {
    each.gate.size = threads;
    each.shared.assign(shared + 128, 0xff);  // not a number wherever it is not written
    for (int w = 0; w < (threads + 31) / 32; w++) each.warps.push_back(std::make_unique<Warp>());
  }
  for (unsigned first = 0; first < all; first += at_a_time) {
    for (unsigned b = 0; b < at_a_time; b++) blocks[b].index = {(first + b) % columns, (first + b) / columns};
    remaining = fibres.size();
    for (size_t f = 0; f < fibres.size(); f++) {
      copies[f].clear();
      groups[f].clear();
      getcontext(&fibres[f]);
      fibres[f].uc_stack.ss_sp = stacks.data() + f * stack;
      fibres[f].uc_stack.ss_size = stack;
      makecontext(&fibres[f], fibre, 0);
    }
    enter(0);
    swapcontext(&home, &fibres[0]);
  }
}

#define __device__
#define __noinline__
using std::max, std::min;
inline void __syncthreads() { block->gate.wait(); }
inline void wait_for_all(const unsigned*) {
  __syncthreads();
  if (threadIdx.x == 0) gate_of_all.wait();
  __syncthreads();
}
inline float __sinf(float x) { return std::sin(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int lane() { return threadIdx.x % 32; }
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
