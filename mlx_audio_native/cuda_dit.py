"""A block's attention in half precision on the tensor cores of an NVIDIA GPU.

MLX hands each operation to the GPU at a price of 3 to 15 µs, so that at batch 1 a step of many small operations waits
for the host. Hence one kernel for all that comes before a block's feed-forward, its blocks of threads waiting for each
other between the parts. `Block` of dit.py is the plain form of the same formulas, for every other device and dtype.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import mlx.core as mx

from . import cuda

_FEW_ROWS = 512  # from which on the library's products are the faster ones
_THREADS = 256

# Fragments of mma.m16n8k16, of a lane l: A holds rows l/4 and l/4 + 8, B column l/4, sums rows l/4, l/4 + 8 and
# columns 2·(l%4), + 1. Tiles in shared memory are rows of 16-byte chunks, chunk c of row r at c ^ (r % 8): no two
# lanes of a load meet in a bank.
_HARDWARE = """
__device__ inline void copy_async(void* to, const void* from, bool there) {
  const unsigned int address = (unsigned int)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all blocks of threads are here, of which each must have a processor; `arrivals` is 0 at first.
__device__ inline void wait_for_all(const unsigned int* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned int before = atomicAdd(const_cast<unsigned int*>(arrivals), 1u);
    const unsigned int goal = (before / gridDim.x + 1) * gridDim.x;
    unsigned int seen = 0;
    for (unsigned int tries = 0; seen < goal; tries++) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
      if (tries == 1u << 26) asm volatile("trap;");  // some ten seconds: better an error than to hang
    }
    __threadfence();
  }
  __syncthreads();
}
__device__ inline void fetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
template <int OPEN>
__device__ inline void wait_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory"); }
__device__ inline void load_fragments(unsigned int (&r)[4], const void* row) {
  const unsigned int address = (unsigned int)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ inline void load_transposed(unsigned int (&r)[4], const void* row) {
  const unsigned int address = (unsigned int)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
#define MULTIPLY_ADD(T, NAME)                                                                                    \\
  __device__ inline void multiply_add(float (&c)[4], const unsigned int (&a)[4], unsigned int b0,                \\
                                      unsigned int b1, const T*) {                                               \\
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, "                \\
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                                 \\
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                \\
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                \\
  }
MULTIPLY_ADD(__half, "f16")
MULTIPLY_ADD(__nv_bfloat16, "bf16")
"""
_TYPES = """
template <typename T>
struct alignas(4) Pair { T a, b; };
template <typename T>
__device__ inline unsigned int packed(float a, float b) {
  Pair<T> pair{static_cast<T>(a), static_cast<T>(b)};
  return *reinterpret_cast<unsigned int*>(&pair);
}
__device__ inline float quad_sum(float s) {
  s += __shfl_xor_sync(0xffffffffu, s, 1);
  return s + __shfl_xor_sync(0xffffffffu, s, 2);
}
__device__ inline float warp_sum(float s) {
  s = quad_sum(s);
  for (int lanes = 4; lanes < 32; lanes *= 2) s += __shfl_xor_sync(0xffffffffu, s, lanes);
  return s;
}
"""

# What blocks of 256 threads do together; `memory` is their shared memory. Functions of their own where they are called
# more than once: code that comes by for the first time takes longer to fetch than to run.
_PARTS = """
constexpr int WARPS = 8;

template <typename T>
struct alignas(16) Eight { T of[8]; };
template <typename T>
struct Norm { const T* gain; const T* shift; float eps; };

// Numbers on their way into the L2 cache.
template <typename T>
__device__ void fetch(const T* from, long long count) {
  const long long line = 128 / sizeof(T);
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i * line < count; i += gridDim.x * blockDim.x)
    fetch_line(from + i * line);
}

// The rows of x, C numbers each, normed by a warp each; to x is then added what there is to add.
template <typename T, int C>
__device__ __noinline__ void norm_rows(T* x, Norm<T> norm, T* out, int rows, const T* added) {
  constexpr int PARTS = (C / 8 + 31) / 32;
  const int lane = threadIdx.x & 31;
  for (int row = threadIdx.x / 32 * gridDim.x + blockIdx.x; row < rows; row += WARPS * gridDim.x) {
    Eight<T> given[PARTS];
    float numbers[PARTS][8];
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const int chunk = lane + 32 * i;
      if (chunk < C / 8) {
        given[i] = *reinterpret_cast<const Eight<T>*>(x + (long long)row * C + chunk * 8);
        #pragma unroll
        for (int e = 0; e < 8; e++) sum += numbers[i][e] = static_cast<float>(given[i].of[e]);
      }
    }
    const float mean = warp_sum(sum) / C;
    float spread = 0.0f;
    #pragma unroll
    for (int i = 0; i < PARTS; i++) {
      #pragma unroll
      for (int e = 0; e < 8; e++)
        if (lane + 32 * i < C / 8) spread += (numbers[i][e] - mean) * (numbers[i][e] - mean);
    }
    const float factor = rsqrtf(warp_sum(spread) / C + norm.eps);
    #pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const int chunk = lane + 32 * i;
      if (chunk < C / 8) {
        const Eight<T> gain = *reinterpret_cast<const Eight<T>*>(norm.gain + chunk * 8);
        const Eight<T> shift = *reinterpret_cast<const Eight<T>*>(norm.shift + chunk * 8);
        Eight<T> made;
        #pragma unroll
        for (int e = 0; e < 8; e++) {
          const float number = (numbers[i][e] - mean) * factor;
          made.of[e] = static_cast<T>(number * static_cast<float>(gain.of[e]) + static_cast<float>(shift.of[e]));
        }
        *reinterpret_cast<Eight<T>*>(out + (long long)row * C + chunk * 8) = made;
        if (added) {
          const Eight<T> more = *reinterpret_cast<const Eight<T>*>(added + chunk * 8);
          #pragma unroll
          for (int e = 0; e < 8; e++) made.of[e] = static_cast<T>(numbers[i][e] + static_cast<float>(more.of[e]));
          *reinterpret_cast<Eight<T>*>(x + (long long)row * C + chunk * 8) = made;
        }
      }
    }
  }
}

// The heads of D numbers that a row of x begins with, a warp each: queries, then as many keys if there is a norm or a
// rotation for them, normed and rotated in their first half. Rows of `out` hold `out_row` numbers.
template <typename T, int D>
__device__ __noinline__ void prepare_heads(const T* x, int x_row, T* out, int out_row, int rows, int length, int heads,
                                           int all_heads, Norm<T> q_norm, Norm<T> k_norm, const float* cosine,
                                           const float* sine) {
  constexpr int EACH = D / 32;
  const int lane = threadIdx.x & 31;
  for (int i = threadIdx.x / 32 * gridDim.x + blockIdx.x; i < rows * all_heads; i += WARPS * gridDim.x) {
    const int row = i / all_heads;
    const int head = i % all_heads;
    const Norm<T> norm = head < heads ? q_norm : k_norm;
    const T* from = x + (long long)row * x_row + head * D + lane * EACH;
    float numbers[EACH];
    float sum = 0.0f;
    #pragma unroll
    for (int e = 0; e < EACH; e++) sum += numbers[e] = static_cast<float>(from[e]);
    if (norm.gain) {
      const float mean = warp_sum(sum) / D;
      float spread = 0.0f;
      #pragma unroll
      for (int e = 0; e < EACH; e++) spread += (numbers[e] - mean) * (numbers[e] - mean);
      const float factor = rsqrtf(warp_sum(spread) / D + norm.eps);
      #pragma unroll
      for (int e = 0; e < EACH; e++) {
        const float gain = static_cast<float>(norm.gain[lane * EACH + e]);
        numbers[e] = (numbers[e] - mean) * factor * gain + static_cast<float>(norm.shift[lane * EACH + e]);
      }
    }
    if (cosine) {
      // the rotated half is that of the first 16 lanes, of which the second 8 hold what is turned with the first 8
      const int place = row % length * (D / 4) + (lane & 7) * EACH;
      #pragma unroll
      for (int e = 0; e < EACH; e++) {
        const float other = __shfl_xor_sync(0xffffffffu, numbers[e], 8);
        const float across = sine[place + e] * (lane & 8 ? other : -other);
        if (lane < 16) numbers[e] = numbers[e] * cosine[place + e] + across;
      }
    }
    #pragma unroll
    for (int e = 0; e < EACH; e++) out[(long long)row * out_row + head * D + lane * EACH + e] = static_cast<T>(numbers[e]);
  }
}

// x (rows, C) times w (N, C) transposed, onto a residual if there is one. Tiles of BM rows and BN columns are made by
// GROUPS groups of ROWS_OF_WARPS x COLUMNS_OF_WARPS warps, which share 64 channels at a time, STAGES under way.
// All blocks wait for each other, since x is made by all; meanwhile the first weights come.
template <typename T, int C, int N, int BM, int BN, int ROWS_OF_WARPS, int COLUMNS_OF_WARPS>
__device__ __noinline__ void product(const T* x, const T* w, const T* residual, T* out, int rows, void* memory,
                                     const unsigned int* arrivals) {
  constexpr int STAGES = 4;
  constexpr int GROUP = 32 * ROWS_OF_WARPS * COLUMNS_OF_WARPS;
  constexpr int GROUPS = 32 * WARPS / GROUP;
  constexpr int LOAD_ROWS = 4 * WARPS;
  constexpr int MT = BM / ROWS_OF_WARPS / 16;
  constexpr int NT = BN / COLUMNS_OF_WARPS / 8;
  constexpr int STAGE = (BM + BN) * 64;
  constexpr int BLOCKS = C / 64;
  T* stages = reinterpret_cast<T*>(memory);
  const int thread = threadIdx.x;
  const int lane = thread & 31;
  const int group = thread / GROUP;
  const int warp_row = thread / 32 % ROWS_OF_WARPS * (16 * MT);
  const int warp_column = thread % GROUP / 32 / ROWS_OF_WARPS * (8 * NT);
  const int row_blocks = (rows + BM - 1) / BM;
  const int tiles = row_blocks * (N / BN);
  auto load = [&](const T* from, T* to, int lines, int first, int most, int block) {
    #pragma unroll
    for (int i = 0; i < lines / LOAD_ROWS; i++) {
      const int r = thread / 8 + i * LOAD_ROWS;
      const bool there = first + r < most;
      const T* at = from + (there ? (long long)(first + r) * C : 0) + block * 64 + (thread & 7) * 8;
      copy_async(to + r * 64 + ((thread ^ r) & 7) * 8, at, there);
    }
  };
  auto load_x = [&](int tile, int block) {
    load(x, stages + block % STAGES * STAGE, BM, tile % row_blocks * BM, rows, block);
  };
  auto load_w = [&](int tile, int block) {
    load(w, stages + block % STAGES * STAGE + BM * 64, BN, tile / row_blocks * BN, N, block);
  };
  auto begin = [&](int tile) {
    __syncthreads();
    #pragma unroll
    for (int s = 0; s < STAGES - 1; s++)
      if (s < BLOCKS && tile < tiles) load_w(tile, s);
  };
  begin(blockIdx.x);
  wait_for_all(arrivals);
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    if (tile != blockIdx.x) begin(tile);
    #pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
      if (s < BLOCKS) load_x(tile, s);
      close_group();
    }
    float sums[MT][NT][4];
    #pragma unroll
    for (int i = 0; i < MT; i++)
      #pragma unroll
      for (int j = 0; j < NT; j++)
        #pragma unroll
        for (int e = 0; e < 4; e++) sums[i][j][e] = 0.0f;
    for (int block = 0; block < BLOCKS; block++) {
      wait_groups<STAGES - 2>();
      __syncthreads();
      if (block + STAGES - 1 < BLOCKS) {
        load_x(tile, block + STAGES - 1);
        load_w(tile, block + STAGES - 1);
      }
      close_group();
      const T* a = stages + block % STAGES * STAGE;
      const T* b = a + BM * 64;
      #pragma unroll
      for (int step = 0; step < 4; step += GROUPS) {
        const int k = step + group;
        unsigned int fa[MT][4];
        #pragma unroll
        for (int i = 0; i < MT; i++) {
          const int r = warp_row + i * 16 + (lane & 15);
          load_fragments(fa[i], a + r * 64 + ((2 * k + lane / 16) ^ (r & 7)) * 8);
        }
        #pragma unroll
        for (int j = 0; j < NT / 2; j++) {
          unsigned int fb[4];
          const int r = warp_column + j * 16 + (lane & 7) + lane / 16 * 8;
          load_fragments(fb, b + r * 64 + ((2 * k + (lane >> 3 & 1)) ^ (r & 7)) * 8);
          #pragma unroll
          for (int i = 0; i < MT; i++) {
            multiply_add(sums[i][2 * j], fa[i], fb[0], fb[1], x);
            multiply_add(sums[i][2 * j + 1], fa[i], fb[2], fb[3], x);
          }
        }
      }
    }
    float* exchange = reinterpret_cast<float*>(memory);
    #pragma unroll
    for (int half = GROUPS / 2; half > 0; half /= 2) {
      __syncthreads();
      float* own = exchange + thread % (GROUP * half);
      #pragma unroll
      for (int e = 0; e < MT * NT * 4; e++)
        if (group >= half && group < 2 * half) own[e * GROUP * half] = sums[e / (NT * 4)][e / 4 % NT][e % 4];
      __syncthreads();
      #pragma unroll
      for (int e = 0; e < MT * NT * 4; e++)
        if (group < half) sums[e / (NT * 4)][e / 4 % NT][e % 4] += own[e * GROUP * half];
    }
    #pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
      const int row = tile % row_blocks * BM + warp_row + i * 8 + lane / 4;
      if (group == 0 && row < rows) {
        #pragma unroll
        for (int j = 0; j < NT; j++) {
          const int column = tile / row_blocks * BN + warp_column + j * 8 + 2 * (lane & 3);
          const long long at = (long long)row * N + column;
          float first = sums[i / 2][j][i % 2 * 2];
          float second = sums[i / 2][j][i % 2 * 2 + 1];
          if (residual) {
            const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(residual + at);
            first += static_cast<float>(pair.a);
            second += static_cast<float>(pair.b);
          }
          *reinterpret_cast<unsigned int*>(out + at) = packed<T>(first, second);
        }
      }
    }
  }
}

template <typename T>
struct Heads { const T* of; int row; };  // the first head of the first row, and how many numbers a row has

// Attention of `heads` heads of queries (B * length rows) to kv_heads of keys and values (B * count rows). A block makes
// 16 * ROWS_OF_WARPS queries of one head of one clip at a time; keys and values pass in tiles of 64, two under way, each
// shared among GROUPS groups of warps.
template <typename T, int D, int ROWS_OF_WARPS>
__device__ __noinline__ void attend(Heads<T> q, Heads<T> k, Heads<T> v, T* out, int batches, int length, int count,
                                    int heads, int kv_heads, float scale, void* memory) {
  constexpr int CHUNKS = D / 8;
  constexpr int TILE = 64 * D;
  constexpr int ROWS = 16 * ROWS_OF_WARPS;
  constexpr int GROUP = 32 * ROWS_OF_WARPS;
  constexpr int GROUPS = WARPS / ROWS_OF_WARPS;
  constexpr int KEYS = 64 / GROUPS;
  T* queries = reinterpret_cast<T*>(memory);
  T* tiles = queries + ROWS * D;
  const int thread = threadIdx.x;
  const int lane = thread & 31;
  const int warp_row = thread / 32 % ROWS_OF_WARPS * 16;
  const int group = thread / GROUP;
  const int row_blocks = (length + ROWS - 1) / ROWS;
  auto load = [&](T* to, const T* from, int lines, int first, int most, int stride) {
    #pragma unroll
    for (int i = thread; i < lines * CHUNKS; i += 32 * WARPS) {
      const int r = i / CHUNKS;
      const int c = i % CHUNKS;
      const bool there = first + r < most;
      copy_async(to + r * D + (c ^ (r & 7)) * 8, there ? from + (long long)(first + r) * stride + c * 8 : from, there);
    }
  };
  for (int tile = blockIdx.x; tile < row_blocks * heads * batches; tile += gridDim.x) {
    const int first_row = tile % row_blocks * ROWS;
    const int head = tile / row_blocks % heads;
    const int kv_head = head / (heads / kv_heads);
    const long long batch = tile / row_blocks / heads;
    auto load_keys_values = [&](int index) {
      T* to = tiles + index % 2 * 2 * TILE;
      load(to, k.of + batch * count * k.row + kv_head * D, 64, index * 64, count, k.row);
      load(to + TILE, v.of + batch * count * v.row + kv_head * D, 64, index * 64, count, v.row);
    };
    __syncthreads();
    load(queries, q.of + batch * length * q.row + head * D, ROWS, first_row, length, q.row);
    load_keys_values(0);
    close_group();

    unsigned int fq[D / 16][4];
    float sums[D / 8][4];
    float most[2] = {-INFINITY, -INFINITY};
    float total[2] = {0.0f, 0.0f};
    #pragma unroll
    for (int j = 0; j < D / 8; j++)
      #pragma unroll
      for (int e = 0; e < 4; e++) sums[j][e] = 0.0f;
    for (int index = 0; index * 64 < count; index++) {
      const T* keys = tiles + index % 2 * 2 * TILE;
      const T* values = keys + TILE;
      if ((index + 1) * 64 < count) load_keys_values(index + 1);
      close_group();
      wait_groups<1>();
      __syncthreads();
      if (index == 0) {
        #pragma unroll
        for (int c = 0; c < D / 16; c++) {
          const int r = warp_row + (lane & 15);
          load_fragments(fq[c], queries + r * D + ((2 * c + lane / 16) ^ (r & 7)) * 8);
        }
      }
      float scores[KEYS / 8][4];
      #pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
        #pragma unroll
        for (int e = 0; e < 4; e++) scores[j][e] = 0.0f;
      #pragma unroll
      for (int c = 0; c < D / 16; c++) {
        #pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
          unsigned int fk[4];
          const int r = group * KEYS + j * 16 + (lane & 7) + lane / 16 * 8;
          load_fragments(fk, keys + r * D + ((2 * c + (lane >> 3 & 1)) ^ (r & 7)) * 8);
          multiply_add(scores[2 * j], fq[c], fk[0], fk[1], q.of);
          multiply_add(scores[2 * j + 1], fq[c], fk[2], fk[3], q.of);
        }
      }
      #pragma unroll
      for (int h = 0; h < 2; h++) {
        float peak = most[h];
        #pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
          #pragma unroll
          for (int e = 0; e < 2; e++) {
            float& s = scores[j][2 * h + e];
            s = index * 64 + group * KEYS + j * 8 + 2 * (lane & 3) + e < count ? s * scale : -INFINITY;
            peak = fmaxf(peak, s);
          }
        }
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
        most[h] = peak > most[h] ? exp2f(most[h] - peak) : 1.0f;  // how far what there is fades
        float sum = 0.0f;
        #pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
          #pragma unroll
          for (int e = 0; e < 2; e++) {
            float& s = scores[j][2 * h + e];
            s = s > -INFINITY ? exp2f(s - peak) : 0.0f;
            sum += s;
          }
        }
        total[h] = total[h] * most[h] + sum;
        #pragma unroll
        for (int j = 0; j < D / 8; j++) {
          sums[j][2 * h] *= most[h];
          sums[j][2 * h + 1] *= most[h];
        }
        most[h] = peak;
      }
      #pragma unroll
      for (int c = 0; c < KEYS / 16; c++) {
        const unsigned int weights[4] = {
          packed<T>(scores[2 * c][0], scores[2 * c][1]), packed<T>(scores[2 * c][2], scores[2 * c][3]),
          packed<T>(scores[2 * c + 1][0], scores[2 * c + 1][1]), packed<T>(scores[2 * c + 1][2], scores[2 * c + 1][3])};
        #pragma unroll
        for (int j = 0; j < D / 16; j++) {
          unsigned int fv[4];
          const int r = group * KEYS + c * 16 + (lane & 15);
          load_transposed(fv, values + r * D + ((2 * j + lane / 16) ^ (r & 7)) * 8);
          multiply_add(sums[2 * j], weights, fv[0], fv[1], q.of);
          multiply_add(sums[2 * j + 1], weights, fv[2], fv[3], q.of);
        }
      }
      __syncthreads();
    }
    // the groups' sums, brought to the same scale; the first group has seen a key, another perhaps none
    constexpr int ALL = 4 + D / 2;
    float* exchange = reinterpret_cast<float*>(tiles) + thread % GROUP;
    auto place = [&](int from, int e) -> float& { return exchange[((from - 1) * ALL + e) * GROUP]; };
    #pragma unroll
    for (int h = 0; h < 2; h++) {
      total[h] = quad_sum(total[h]);
      if (group > 0) {
        place(group, h) = most[h];
        place(group, 2 + h) = total[h];
        #pragma unroll
        for (int j = 0; j < D / 4; j++) place(group, 4 + 2 * j + h) = sums[j / 2][2 * h + j % 2];
      }
    }
    __syncthreads();
    #pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first_row + warp_row + h * 8 + lane / 4;
      if (group > 0 || row >= length) continue;
      for (int other = 1; other < GROUPS; other++) {
        const float peak = fmaxf(most[h], place(other, h));
        const float own = exp2f(most[h] - peak);
        const float theirs = exp2f(place(other, h) - peak);
        most[h] = peak;
        total[h] = total[h] * own + place(other, 2 + h) * theirs;
        #pragma unroll
        for (int j = 0; j < D / 4; j++) {
          float& s = sums[j / 2][2 * h + j % 2];
          s = s * own + place(other, 4 + 2 * j + h) * theirs;
        }
      }
      const float inverse = 1.0f / total[h];
      #pragma unroll
      for (int j = 0; j < D / 8; j++) {
        const long long at = (batch * length + row) * (heads * D) + head * D + j * 8 + 2 * (lane & 3);
        *reinterpret_cast<unsigned int*>(out + at) = packed<T>(sums[j][2 * h] * inverse, sums[j][2 * h + 1] * inverse);
      }
    }
  }
}
"""

_MEMORY = "  extern __shared__ __align__(128) unsigned char memory[];\n"
_HEADS = """
  prepare_heads<T, D>(x, x_shape[1], out, 2 * HEADS * D, x_shape[0], LENGTH, HEADS, 2 * HEADS, Q_NORM, K_NORM, cosine, sine);
"""
_ATTENTION = """
  attend<T, D, 4>({q, q_shape[2]}, {k + K_START, k_shape[2]}, {v + V_START, v_shape[2]}, out, q_shape[0], q_shape[1],
                  k_shape[1], HEADS, KV_HEADS, SCALE, memory);
"""

# Everything up to the feed-forward. `scratch` holds what goes into a product, and behind it what came out of one.
_BLOCK = """
  constexpr int E = HEADS * D;
  const int rows = x_shape[0];
  const int clips = k_shape[0];
  const int length = rows / clips;
  T* before = scratch;
  T* after = scratch + (long long)rows * E;
  fetch(to_qkv, 3 * E * E);
  norm_rows<T, E>(const_cast<T*>(x), SELF_NORM, before, rows, nullptr);
  product<T, E, 3 * E, 64, 3 * E % 128 ? 64 : 128, 2, 3 * E % 128 ? 2 : 4>(
    before, to_qkv, nullptr, after, rows, memory, arrivals);
  fetch(self_out, E * E);
  fetch(to_q, E * E);
  fetch(cross_out, E * E);
  wait_for_all(arrivals);
  prepare_heads<T, D>(after, 3 * E, after, 3 * E, rows, length, HEADS, 2 * HEADS, Q_NORM, K_NORM, cosine, sine);
  wait_for_all(arrivals);
  attend<T, D, 2>({after, 3 * E}, {after + E, 3 * E}, {after + 2 * E, 3 * E}, before, clips, length, length, HEADS, HEADS,
                  SCALE, memory);
  product<T, E, E, 64, 64, 2, 2>(before, self_out, x, out, rows, memory, arrivals);
  wait_for_all(arrivals);
  norm_rows<T, E>(out, CROSS_NORM, before, rows, nullptr);
  product<T, E, E, 64, 64, 2, 2>(before, to_q, nullptr, after, rows, memory, arrivals);
  wait_for_all(arrivals);
  prepare_heads<T, D>(after, E, after, E, rows, length, HEADS, HEADS, CROSS_Q_NORM, {}, nullptr, nullptr);
  wait_for_all(arrivals);
  attend<T, D, 2>({after, E}, {k, k_shape[2]}, {v, k_shape[2]}, before, clips, length, k_shape[1], HEADS, KV_HEADS, SCALE,
                  memory);
  product<T, E, E, 64, 64, 2, 2>(before, cross_out, out, out, rows, memory, arrivals);
  wait_for_all(arrivals);
  norm_rows<T, E>(out, FF_NORM, normed, rows, ff_bias);
"""


class Norm(NamedTuple):
    """A LayerNorm's gain and shift, and its epsilon."""

    gain: mx.array
    shift: mx.array
    eps: float


class Rotation(NamedTuple):
    """Cosines and sines (at least the length, a quarter of a head's dimensions, as half of them are rotated), float32."""

    cosine: mx.array
    sine: mx.array


def usable(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether attention runs here: in half precision, from compute capability 8.0 on."""
    fits = dtype in (mx.float16, mx.bfloat16) and head_dim in (64, 128)
    return fits and cuda.is_default() and cuda.capability() >= 8


def is_small(x: mx.array) -> bool:
    """Whether `block` is the faster way: with few rows, to hand over operations costs more than to run them."""
    return len(x) <= _FEW_ROWS and cuda.processors() > 0


def arrivals(t: mx.array) -> mx.array:
    """What `block` counts with, for one step: zeros in memory of their own, which a constant would not have."""
    t = mx.broadcast_to(t, (32, len(t)))  # up to 8 bytes would lie in memory of the host
    return (t != t).astype(mx.uint32)


def _spell(source: str, head_dim: int, norms: dict[str, Norm | None]) -> tuple[str, dict[str, mx.array]]:
    """A source with its norms and the scale of its scores in it, and the inputs that the norms are."""
    inputs = {}
    for name, norm in norms.items():
        text = "{}"
        if norm:
            gain, shift = f"{name.lower()}_gain", f"{name.lower()}_shift"
            inputs |= {gain: norm.gain, shift: norm.shift}
            text = f"Norm<T>{{{gain}, {shift}, {norm.eps:.9e}f}}"
        source = re.sub(rf"\b{name}\b", text, source)
    return source.replace("SCALE", f"{head_dim**-0.5 * math.log2(math.e):.9e}f"), inputs


def prepare_heads(
    qkv: mx.array, head_dim: int, length: int, norms: tuple[Norm | None, Norm | None], rotation: Rotation
) -> mx.array:
    """Of qkv (B·length, 3·E) the queries and keys, normed if there are norms and rotated: (B·length, 2·E)."""
    source, inputs = _spell(_HEADS, head_dim, dict(zip(("Q_NORM", "K_NORM"), norms, strict=True)))
    inputs = {"x": qkv} | inputs | rotation._asdict()
    rows, heads = len(qkv), qkv.shape[1] // head_dim // 3
    constants = {"D": head_dim, "HEADS": heads, "LENGTH": length}
    shape = rows, 2 * heads * head_dim
    return _launch("prepare_heads", source, inputs, {"out": shape}, constants, -(-rows * 2 * heads // 8), 0)[0]


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    head_dim: int,
    heads: int,
    kv_heads: int,
    starts: tuple[int, int] = (0, 0),
) -> mx.array:
    """q (B, L, …), its heads first in a row, k and v (B, M, …), theirs from `starts` on → (B·L, heads · head_dim)."""
    batch, length = q.shape[:2]
    constants = {"D": head_dim, "HEADS": heads, "KV_HEADS": kv_heads, "K_START": starts[0], "V_START": starts[1]}
    source, _ = _spell(_ATTENTION, head_dim, {})
    shape, blocks = (batch * length, heads * head_dim), -(-length // 64) * heads * batch
    inputs = {"q": q, "k": k, "v": v}
    return _launch("attention", source, inputs, {"out": shape}, constants, blocks, _attention_memory(head_dim))[0]


def block(
    x: mx.array,
    weights: dict[str, mx.array],
    norms: dict[str, Norm | None],
    rotation: Rotation,
    keys_values: tuple[mx.array, mx.array],
    head_dim: int,
    arrivals: mx.array,
) -> tuple[mx.array, mx.array]:
    """x (B·L, E) after a block's self- and cross-attention plus `ff_bias`, and its norm (without) for the feed-forward.

    Args:
        x: (B·L, E), with E a multiple of 64.
        weights: to_qkv (3·E, E); self_out, to_q and cross_out (E, E); ff_bias (E,).
        norms: SELF_NORM, CROSS_NORM and FF_NORM of E numbers; Q_NORM, K_NORM and CROSS_Q_NORM of a head's, or None.
        rotation: of the clip's positions.
        keys_values: cross-attention's, (B, M, kv_heads · head_dim) each, the keys normed.
        head_dim: 64 or 128.
        arrivals: see `arrivals`.
    """
    source, inputs = _spell(_BLOCK, head_dim, norms)
    width = x.shape[1]
    inputs = {"x": x} | weights | dict(zip("kv", keys_values, strict=True)) | inputs | rotation._asdict()
    constants = {"D": head_dim, "HEADS": width // head_dim, "KV_HEADS": keys_values[0].shape[2] // head_dim}
    outputs = {"out": x.shape, "normed": x.shape, "scratch": (len(x), 4 * width)}
    memory = max(4 * (64 + 128) * 64 * x.itemsize, _attention_memory(head_dim))
    inputs["arrivals"] = arrivals
    return tuple(_launch("block", source, inputs, outputs, constants, cuda.processors(), memory)[:2])


def _attention_memory(head_dim: int) -> int:
    return 5 * 64 * head_dim * 2


def _launch(
    name: str,
    source: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[int, ...]],
    constants: dict[str, int],
    blocks: int,
    shared_memory: int,
) -> list[mx.array]:
    """The outputs, in the dtype of the first input."""
    dtype = next(iter(inputs.values())).dtype
    header = _HARDWARE + _TYPES + _PARTS
    return cuda.build(name, tuple(inputs), tuple(outputs), _MEMORY + source, header, shared_memory)(
        inputs=list(inputs.values()),
        template=[("T", dtype), *constants.items()],
        grid=(blocks * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=list(outputs.values()),
        output_dtypes=[dtype] * len(outputs),
    )
