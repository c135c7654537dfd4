"""Attention and its products in half precision on the tensor cores of an NVIDIA GPU.

MLX hands each operation to the GPU at a price of 3 to 15 µs, so that at batch 1 a step of many small operations waits
for the host. These kernels join what stands around a product with it. `Attention` of dit.py is the plain form of the
same formula, for every other device and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from . import cuda

_FEW_ROWS = 1024  # from which on the library's product is the faster one

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
"""

# x (rows, C) and w (N, C), both tiles of 64 channels, STAGES of them under way. A block makes BM rows of BN columns by
# GROUPS groups of ROWS_OF_WARPS × COLUMNS_OF_WARPS warps, which share the channels of a tile among them.
_PRODUCT = """
  constexpr int GROUP = 32 * ROWS_OF_WARPS * COLUMNS_OF_WARPS;
  constexpr int LOAD_ROWS = GROUP * GROUPS / 8;
  constexpr int MT = BM / ROWS_OF_WARPS / 16;
  constexpr int NT = BN / COLUMNS_OF_WARPS / 8;
  constexpr int STAGE = (BM + BN) * 64;
  constexpr int BLOCKS = C / 64;
  extern __shared__ __align__(128) unsigned char memory[];
  T* tiles = reinterpret_cast<T*>(memory);
  const int thread = threadIdx.x;
  const int lane = thread & 31;
  const int group = thread / GROUP;
  const int warp_row = thread / 32 % ROWS_OF_WARPS * (16 * MT);
  const int warp_column = thread % GROUP / 32 / ROWS_OF_WARPS * (8 * NT);
  const int rows = x_shape[0];
  const int row_blocks = (rows + BM - 1) / BM;
  const int first_row = blockIdx.x % row_blocks * BM;
  const int column_block = blockIdx.x / row_blocks;
  const int first_column = column_block * BN;
  auto load = [&](int block) {
    T* tile = tiles + block % STAGES * STAGE;
    const int chunk = thread & 7;
    #pragma unroll
    for (int i = 0; i < (BM + BN) / LOAD_ROWS; i++) {
      const int r = thread / 8 + i * LOAD_ROWS;
      const bool of_x = i < BM / LOAD_ROWS;
      const int row = of_x ? first_row + r : first_column + r - BM;
      const bool there = !of_x || row < rows;
      const T* from = (of_x ? x : w) + (there ? (long long)row * C : 0) + block * 64 + chunk * 8;
      copy_async(tile + r * 64 + (chunk ^ (r & 7)) * 8, from, there);
    }
  };
  float sums[MT][NT][4];
  #pragma unroll
  for (int i = 0; i < MT; i++)
    #pragma unroll
    for (int j = 0; j < NT; j++)
      #pragma unroll
      for (int e = 0; e < 4; e++) sums[i][j][e] = 0.0f;
  #pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < BLOCKS) load(s);
    close_group();
  }
  for (int block = 0; block < BLOCKS; block++) {
    wait_groups<STAGES - 2>();
    __syncthreads();
    if (block + STAGES - 1 < BLOCKS) load(block + STAGES - 1);
    close_group();
    const T* a = tiles + block % STAGES * STAGE;
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
  if (group > 0) return;
  #pragma unroll
  for (int i = 0; i < MT; i++) {
    #pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first_row + warp_row + i * 16 + h * 8 + lane / 4;
      EACH_ROW
    }
  }
"""

_ONTO = """
      if (row < rows) {
        #pragma unroll
        for (int j = 0; j < NT; j++) {
          const int n = first_column + warp_column + j * 8 + 2 * (lane & 3);
          const long long at = (long long)row * N + n;
          const Pair<T> r = *reinterpret_cast<const Pair<T>*>(residual + at);
          const float first = sums[i][j][2 * h] + static_cast<float>(r.a);
          const float second = sums[i][j][2 * h + 1] + static_cast<float>(r.b);
          *reinterpret_cast<unsigned int*>(out + at) = packed<T>(first, second);
        }
      }
"""

# A tile of columns is one head: the first third of them queries, the next keys. These are normed and rotated.
_HEADS = """
      if (column_block < 2 * HEADS) {
        NORM_HEAD
        const int place = row % LENGTH * (ROTARY / 2);
        #pragma unroll
        for (int j = 0; j < ROTARY / 16; j++) {
          #pragma unroll
          for (int e = 0; e < 2; e++) {
            const int c = place + j * 8 + 2 * (lane & 3) + e;
            const float first = sums[i][j][2 * h + e];
            const float second = sums[i][j + ROTARY / 16][2 * h + e];
            sums[i][j][2 * h + e] = first * cosine[c] - second * sine[c];
            sums[i][j + ROTARY / 16][2 * h + e] = second * cosine[c] + first * sine[c];
          }
        }
      }
      if (row < rows) {
        #pragma unroll
        for (int j = 0; j < NT; j++) {
          const long long at = (long long)row * N + first_column + j * 8 + 2 * (lane & 3);
          *reinterpret_cast<unsigned int*>(out + at) = packed<T>(sums[i][j][2 * h], sums[i][j][2 * h + 1]);
        }
      }
"""
_NORM_HEAD = """
        float sum = 0.0f;
        #pragma unroll
        for (int j = 0; j < NT; j++) sum += sums[i][j][2 * h] + sums[i][j][2 * h + 1];
        const float mean = quad_sum(sum) / BN;
        float spread = 0.0f;
        #pragma unroll
        for (int j = 0; j < NT; j++) {
          #pragma unroll
          for (int e = 0; e < 2; e++) {
            const float away = sums[i][j][2 * h + e] - mean;
            spread += away * away;
          }
        }
        const float factor = rsqrtf(quad_sum(spread) / BN + NORM_EPS);
        const T* gain = column_block < HEADS ? q_gain : k_gain;
        const T* shift = column_block < HEADS ? q_shift : k_shift;
        #pragma unroll
        for (int j = 0; j < NT; j++) {
          #pragma unroll
          for (int e = 0; e < 2; e++) {
            const int c = j * 8 + 2 * (lane & 3) + e;
            float& s = sums[i][j][2 * h + e];
            s = (s - mean) * factor * static_cast<float>(gain[c]) + static_cast<float>(shift[c]);
          }
        }
"""

# A block of four warps makes 64 queries of one head; keys and values pass in tiles of 64, two under way.
_ATTENTION = """
  constexpr int CHUNKS = D / 8;
  constexpr int TILE = 64 * D;
  extern __shared__ __align__(128) unsigned char memory[];
  T* queries = reinterpret_cast<T*>(memory);
  T* tiles = queries + TILE;
  const int thread = threadIdx.x;
  const int lane = thread & 31;
  const int warp = thread / 32;
  const int length = q_shape[1];
  const int count = k_shape[1];
  const int row_blocks = (length + 63) / 64;
  const int first_row = blockIdx.x % row_blocks * 64;
  const int head = blockIdx.x / row_blocks % HEADS;
  const int batch = blockIdx.x / row_blocks / HEADS;
  const T* q_from = q + (long long)batch * length * Q_ROW + head * D;
  const int kv_head = head / (HEADS / KV_HEADS);
  const T* k_from = k + (long long)batch * count * KV_ROW + K_START + kv_head * D;
  const T* v_from = v + (long long)batch * count * KV_ROW + V_START + kv_head * D;
  auto load = [&](T* to, const T* from, int first, int most, int stride) {
    #pragma unroll
    for (int i = thread; i < 64 * CHUNKS; i += 128) {
      const int r = i / CHUNKS;
      const int c = i % CHUNKS;
      const bool there = first + r < most;
      copy_async(to + r * D + (c ^ (r & 7)) * 8, there ? from + (long long)(first + r) * stride + c * 8 : from, there);
    }
  };
  const int tile_count = (count + 63) / 64;
  load(queries, q_from, first_row, length, Q_ROW);
  load(tiles, k_from, 0, count, KV_ROW);
  load(tiles + TILE, v_from, 0, count, KV_ROW);
  close_group();

  unsigned int fq[D / 16][4];
  float sums[D / 8][4];
  float most[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0f, 0.0f};
  #pragma unroll
  for (int j = 0; j < D / 8; j++)
    #pragma unroll
    for (int e = 0; e < 4; e++) sums[j][e] = 0.0f;
  for (int tile = 0; tile < tile_count; tile++) {
    const T* keys = tiles + tile % 2 * 2 * TILE;
    const T* values = keys + TILE;
    if (tile + 1 < tile_count) {
      T* next = tiles + (tile + 1) % 2 * 2 * TILE;
      load(next, k_from, (tile + 1) * 64, count, KV_ROW);
      load(next + TILE, v_from, (tile + 1) * 64, count, KV_ROW);
    }
    close_group();
    wait_groups<1>();
    __syncthreads();
    if (tile == 0) {
      #pragma unroll
      for (int c = 0; c < D / 16; c++) {
        const int r = warp * 16 + (lane & 15);
        load_fragments(fq[c], queries + r * D + ((2 * c + lane / 16) ^ (r & 7)) * 8);
      }
      NORM_QUERIES
    }
    float scores[8][4];
    #pragma unroll
    for (int j = 0; j < 8; j++)
      #pragma unroll
      for (int e = 0; e < 4; e++) scores[j][e] = 0.0f;
    #pragma unroll
    for (int c = 0; c < D / 16; c++) {
      #pragma unroll
      for (int j = 0; j < 4; j++) {
        unsigned int fk[4];
        const int r = j * 16 + (lane & 7) + lane / 16 * 8;
        load_fragments(fk, keys + r * D + ((2 * c + (lane >> 3 & 1)) ^ (r & 7)) * 8);
        multiply_add(scores[2 * j], fq[c], fk[0], fk[1], q);
        multiply_add(scores[2 * j + 1], fq[c], fk[2], fk[3], q);
      }
    }
    #pragma unroll
    for (int h = 0; h < 2; h++) {
      float peak = most[h];
      #pragma unroll
      for (int j = 0; j < 8; j++) {
        #pragma unroll
        for (int e = 0; e < 2; e++) {
          float& s = scores[j][2 * h + e];
          s = tile * 64 + j * 8 + 2 * (lane & 3) + e < count ? s * SCALE : -INFINITY;
          peak = fmaxf(peak, s);
        }
      }
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
      const float fade = exp2f(most[h] - peak);
      most[h] = peak;
      float sum = 0.0f;
      #pragma unroll
      for (int j = 0; j < 8; j++) {
        #pragma unroll
        for (int e = 0; e < 2; e++) {
          float& s = scores[j][2 * h + e];
          s = exp2f(s - peak);
          sum += s;
        }
      }
      total[h] = total[h] * fade + sum;
      #pragma unroll
      for (int j = 0; j < D / 8; j++) {
        sums[j][2 * h] *= fade;
        sums[j][2 * h + 1] *= fade;
      }
    }
    #pragma unroll
    for (int c = 0; c < 4; c++) {
      const unsigned int weights[4] = {
        packed<T>(scores[2 * c][0], scores[2 * c][1]), packed<T>(scores[2 * c][2], scores[2 * c][3]),
        packed<T>(scores[2 * c + 1][0], scores[2 * c + 1][1]), packed<T>(scores[2 * c + 1][2], scores[2 * c + 1][3])};
      #pragma unroll
      for (int j = 0; j < D / 16; j++) {
        unsigned int fv[4];
        const int r = c * 16 + (lane & 15);
        load_transposed(fv, values + r * D + ((2 * j + lane / 16) ^ (r & 7)) * 8);
        multiply_add(sums[2 * j], weights, fv[0], fv[1], q);
        multiply_add(sums[2 * j + 1], weights, fv[2], fv[3], q);
      }
    }
    __syncthreads();
  }
  #pragma unroll
  for (int h = 0; h < 2; h++) {
    const float inverse = 1.0f / quad_sum(total[h]);
    const int row = first_row + warp * 16 + h * 8 + lane / 4;
    if (row < length) {
      #pragma unroll
      for (int j = 0; j < D / 8; j++) {
        const long long at = ((long long)batch * length + row) * (HEADS * D) + head * D + j * 8 + 2 * (lane & 3);
        *reinterpret_cast<unsigned int*>(out + at) = packed<T>(sums[j][2 * h] * inverse, sums[j][2 * h + 1] * inverse);
      }
    }
  }
"""

# Cross-attention's queries as they lie in fragments: registers h and h + 2 hold columns of row l/4 + 8·h.
_NORM_QUERIES = """
      #pragma unroll
      for (int h = 0; h < 2; h++) {
        float sum = 0.0f;
        #pragma unroll
        for (int c = 0; c < D / 8; c++) {
          const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(&fq[c / 2][h + c % 2 * 2]);
          sum += static_cast<float>(pair.a) + static_cast<float>(pair.b);
        }
        const float mean = quad_sum(sum) / D;
        float spread = 0.0f;
        #pragma unroll
        for (int c = 0; c < D / 8; c++) {
          const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(&fq[c / 2][h + c % 2 * 2]);
          const float first = static_cast<float>(pair.a) - mean;
          const float second = static_cast<float>(pair.b) - mean;
          spread += first * first + second * second;
        }
        const float factor = rsqrtf(quad_sum(spread) / D + NORM_EPS);
        #pragma unroll
        for (int c = 0; c < D / 8; c++) {
          const int n = c * 8 + 2 * (lane & 3);
          const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(&fq[c / 2][h + c % 2 * 2]);
          const float first = (static_cast<float>(pair.a) - mean) * factor;
          const float second = (static_cast<float>(pair.b) - mean) * factor;
          fq[c / 2][h + c % 2 * 2] = packed<T>(
            first * static_cast<float>(gain[n]) + static_cast<float>(shift[n]),
            second * static_cast<float>(gain[n + 1]) + static_cast<float>(shift[n + 1]));
        }
      }
"""


def usable(dtype: mx.Dtype) -> bool:
    """Whether attention and its products run here: in half precision, from compute capability 8.0 on."""
    return dtype in (mx.float16, mx.bfloat16) and cuda.is_default() and cuda.capability() >= 8


def _launch(
    name: str,
    source: str,
    inputs: dict[str, mx.array],
    shape: tuple[int, ...],
    constants: dict[str, int],
    blocks: int,
    threads: int,
    shared_memory: int,
) -> mx.array:
    """The output `out` of that shape, in the dtype of the first input; `threads` are a block's."""
    dtype = next(iter(inputs.values())).dtype
    return cuda.build(name, tuple(inputs), ("out",), source, _HARDWARE + _TYPES, shared_memory)(
        inputs=list(inputs.values()),
        template=[("T", dtype), *constants.items()],
        grid=(blocks * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )[0]


def _product(
    name: str,
    x: mx.array,
    weight: mx.array,
    inputs: dict[str, mx.array],
    each_row: str,
    constants: dict[str, int],
    tile: tuple[int, int, int, int, int],
) -> mx.array:
    rows, columns, rows_of_warps, columns_of_warps, groups = tile
    stages = 4
    constants = {
        "C": x.shape[1],
        "N": len(weight),
        "BM": rows,
        "BN": columns,
        "ROWS_OF_WARPS": rows_of_warps,
        "COLUMNS_OF_WARPS": columns_of_warps,
        "GROUPS": groups,
        "STAGES": stages,
        **constants,
    }
    blocks = -(-len(x) // rows) * (len(weight) // columns)
    threads = 32 * rows_of_warps * columns_of_warps * groups
    shared_memory = stages * (rows + columns) * 64 * x.itemsize
    source = _PRODUCT.replace("      EACH_ROW\n", each_row)
    shape = len(x), len(weight)
    return _launch(name, source, {"x": x, "w": weight, **inputs}, shape, constants, blocks, threads, shared_memory)


def project_onto(residual: mx.array, x: mx.array, weight: mx.array) -> mx.array:
    """residual (rows, N) + x (rows, C) · weight (N, C)ᵀ"""
    if len(x) > _FEW_ROWS:
        return mx.addmm(residual, x, weight.T)
    return _product("project_onto", x, weight, {"residual": residual}, _ONTO, {}, (64, 64, 2, 2, 4))


def project_heads(
    x: mx.array,
    weight: mx.array,
    heads: int,
    length: int,
    norms: Sequence[mx.array] | None,
    eps: float,
    rotation: tuple[mx.array, mx.array],
) -> mx.array:
    """x (B·length, C) · weight (3·heads·D, C)ᵀ: queries and keys normed and rotated, and values, side by side.

    `norms` are gains and shifts of queries, then keys, (D,) each; `rotation` cosines and sines (length, half of the
    rotated dimensions), float32.
    """
    inputs = {"cosine": rotation[0], "sine": rotation[1]}
    each_row = _HEADS.replace("        NORM_HEAD\n", _NORM_HEAD.replace("NORM_EPS", f"{eps:.9e}f") if norms else "")
    if norms:
        inputs |= dict(zip(("q_gain", "q_shift", "k_gain", "k_shift"), norms, strict=True))
    constants = {"HEADS": heads, "LENGTH": length, "ROTARY": 2 * rotation[0].shape[1]}
    tile = 64, len(weight) // (3 * heads), 4, 1, 2
    return _product("project_heads", x, weight, inputs, each_row, constants, tile)


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    head_dim: int,
    heads: int,
    kv_heads: int,
    starts: tuple[int, int],
    q_norm: tuple[mx.array, mx.array] | None = None,
    eps: float = 0.0,
) -> mx.array:
    """q (B, L, …), its heads first in a row, k and v (B, M, …), theirs from `starts` on → (B·L, heads · head_dim).

    Queries are normed first if there are gain and shift, (head_dim,) each, to do it with.
    """
    batch, length = q.shape[:2]
    source = _ATTENTION.replace("SCALE", f"{head_dim**-0.5 * math.log2(math.e):.9e}f")
    norm = _NORM_QUERIES.replace("NORM_EPS", f"{eps:.9e}f") if q_norm else ""
    inputs = {"q": q, "k": k, "v": v} | (dict(zip(("gain", "shift"), q_norm, strict=True)) if q_norm else {})
    constants = {
        "D": head_dim,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "Q_ROW": q.shape[2],
        "KV_ROW": k.shape[2],
        "K_START": starts[0],
        "V_START": starts[1],
    }
    blocks = -(-length // 64) * heads * batch
    shape = batch * length, heads * head_dim
    source = source.replace("      NORM_QUERIES\n", norm)
    return _launch("attention", source, inputs, shape, constants, blocks, 128, 5 * 64 * head_dim * q.itemsize)
