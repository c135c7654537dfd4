// What the kernels of cuda_dit.py are made of. A kernel says before how many WARPS a block of threads has, of 32 threads
// each; `memory` is its shared memory.
//
// Fragments of mma.m16n8k16, of a lane l: A holds rows l/4 and l/4 + 8, B column l/4, sums rows l/4, l/4 + 8 and columns
// 2*(l%4), + 1. Tiles in shared memory are rows of 16-byte chunks, chunk c of row r at c ^ (r % 8): no two lanes of a
// load meet in a bank. Functions are called, not copied in, where there is more than one call: code that comes by for
// the first time takes longer to fetch than to run.

#ifdef __CUDACC__  // else whoever compiles it brings these
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
      if (tries == 1u << 26) asm volatile("trap;");  // better an error than to hang
    }
    __threadfence();
  }
  __syncthreads();
}
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
#define MULTIPLY_ADD(T, NAME)                                                                                    \
  __device__ inline void multiply_add(float (&c)[4], const unsigned int (&a)[4], unsigned int b0,                \
                                      unsigned int b1, const T*) {                                               \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, "                \
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                                 \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                \
  }
MULTIPLY_ADD(__half, "f16")
MULTIPLY_ADD(__nv_bfloat16, "bf16")
#endif

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

template <typename T, int COUNT>
struct alignas(COUNT * sizeof(T)) Some { T of[COUNT]; };
template <typename T>
struct Norm { const T* gain; const T* shift; float eps; };

template <typename T, int COUNT>
__device__ inline Some<T, COUNT> load(const T* from) { return *reinterpret_cast<const Some<T, COUNT>*>(from); }
// COUNT neighbours, more of them added to some, at most 16 bytes a load.
template <int COUNT, typename T>
__device__ inline void add(float (&sums)[COUNT], const T* x) {
  constexpr int EACH = COUNT * sizeof(T) > 16 ? 16 / sizeof(T) : COUNT;
  #pragma unroll
  for (int i = 0; i < COUNT; i += EACH) {
    const Some<T, EACH> some = load<T, EACH>(x + i);
    #pragma unroll
    for (int e = 0; e < EACH; e++) sums[i + e] += static_cast<float>(some.of[e]);
  }
}

// The sum of x, PARTS parts and a bias, if there is one, as `sum`, and normed as `out`: rows of C numbers, a warp each.
template <typename T, int C, int PARTS, typename X>
__device__ __noinline__ void norm_rows(const T* x, const X* parts, const T* bias, Norm<T> norm, T* sum, T* out,
                                       int rows) {
  constexpr int CHUNKS = (C / 8 + 31) / 32;
  const int lane = threadIdx.x & 31;
  for (int row = threadIdx.x / 32 * gridDim.x + blockIdx.x; row < rows; row += WARPS * gridDim.x) {
    const long long start = (long long)row * C;
    float numbers[CHUNKS][8] = {};
    float total = 0.0f;
    #pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      const int at = (lane + 32 * i) * 8;
      if (at < C) {
        add<8>(numbers[i], x + start + at);
        #pragma unroll
        for (int part = 0; part < PARTS; part++) add<8>(numbers[i], parts + (long long)part * rows * C + start + at);
        if (bias) add<8>(numbers[i], bias + at);
      }
    }
    #pragma unroll
    for (int i = 0; i < CHUNKS; i++)
      #pragma unroll
      for (int e = 0; e < 8; e++) total += numbers[i][e];
    const float mean = warp_sum(total) / C;
    float spread = 0.0f;
    #pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      #pragma unroll
      for (int e = 0; e < 8; e++)
        if ((lane + 32 * i) * 8 < C) spread += (numbers[i][e] - mean) * (numbers[i][e] - mean);
    }
    const float factor = rsqrtf(warp_sum(spread) / C + norm.eps);
    #pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      const int at = (lane + 32 * i) * 8;
      if (at < C) {
        const Some<T, 8> gain = load<T, 8>(norm.gain + at);
        const Some<T, 8> shift = load<T, 8>(norm.shift + at);
        Some<T, 8> made, kept;
        #pragma unroll
        for (int e = 0; e < 8; e++) {
          const float number = (numbers[i][e] - mean) * factor;
          made.of[e] = static_cast<T>(number * static_cast<float>(gain.of[e]) + static_cast<float>(shift.of[e]));
          kept.of[e] = static_cast<T>(numbers[i][e]);
        }
        *reinterpret_cast<Some<T, 8>*>(out + start + at) = made;
        *reinterpret_cast<Some<T, 8>*>(sum + start + at) = kept;
      }
    }
  }
}

// A head, COUNT numbers of it each of 8 neighbouring lanes, normed if there is a norm.
template <int COUNT, typename T>
__device__ inline void norm_head(float (&numbers)[COUNT], Norm<T> norm) {
  auto sum_all = [](float s) { return quad_sum(s) + __shfl_xor_sync(0xffffffffu, quad_sum(s), 4); };
  float sum = 0.0f;
  #pragma unroll
  for (int e = 0; e < COUNT; e++) sum += numbers[e];
  const float mean = sum_all(sum) / (8 * COUNT);
  float spread = 0.0f;
  #pragma unroll
  for (int e = 0; e < COUNT; e++) spread += (numbers[e] - mean) * (numbers[e] - mean);
  const float square = sum_all(spread) / (8 * COUNT);
  if (!norm.gain) return;  // not before: warps add up together, and their heads may differ in it
  const float factor = rsqrtf(square + norm.eps);
  const Some<T, COUNT> gain = load<T, COUNT>(norm.gain + (threadIdx.x & 7) * COUNT);
  const Some<T, COUNT> shift = load<T, COUNT>(norm.shift + (threadIdx.x & 7) * COUNT);
  #pragma unroll
  for (int e = 0; e < COUNT; e++) {
    const float number = (numbers[e] - mean) * factor;
    numbers[e] = number * static_cast<float>(gain.of[e]) + static_cast<float>(shift.of[e]);
  }
}

// The heads of D numbers that a row of x begins with, by 8 lanes each: `heads` of queries, as many of keys, the rest of
// values. Queries and keys are normed if there is a norm, and rotated in their first half.
template <typename T, int D, typename X>
__device__ __noinline__ void prepare_heads(const X* x, int x_row, T* out, int out_row, int rows, int length, int heads,
                                           int all_heads, Norm<T> q_norm, Norm<T> k_norm, const float* cosine,
                                           const float* sine) {
  constexpr int EACH = D / 8;
  const int lane = threadIdx.x & 7;
  const int count = rows * all_heads;
  // what is beyond the end is computed once more, since warps add up together
  for (int i = (blockIdx.x * WARPS * 32 + threadIdx.x) / 32 * 4; i < count; i += gridDim.x * WARPS * 4) {
    const int own = min(i + (int)(threadIdx.x / 8 & 3), count - 1);
    const int row = own / all_heads;
    const int at = own % all_heads * D + lane * EACH;
    const int kind = own % all_heads / heads;
    float numbers[EACH] = {};
    add(numbers, x + (long long)row * x_row + at);
    norm_head(numbers, kind == 0 ? q_norm : kind == 1 ? k_norm : Norm<T>{});
    // the first 4 lanes hold the rotated half, the second 2 of them what is turned with the first 2
    const int place = row % length * (D / 4) + (lane & 1) * EACH;
    #pragma unroll
    for (int e = 0; e < EACH; e++) {
      const float other = __shfl_xor_sync(0xffffffffu, numbers[e], 2);
      const float across = sine[place + e] * (lane & 2 ? other : -other);
      if (lane < 4 && kind < 2) numbers[e] = numbers[e] * cosine[place + e] + across;
    }
    Some<T, EACH> made;
    #pragma unroll
    for (int e = 0; e < EACH; e++) made.of[e] = static_cast<T>(numbers[e]);
    *reinterpret_cast<Some<T, EACH>*>(out + (long long)row * out_row + at) = made;
  }
}

// Rows of x, of 2 * width numbers: the first half times SiLU of the second.
template <typename T>
__device__ __noinline__ void gate_rows(const T* x, T* out, int rows, int width) {
  const unsigned int packs = width / 8;
  for (unsigned int i = blockIdx.x * WARPS * 32 + threadIdx.x; i < rows * packs; i += gridDim.x * WARPS * 32) {
    const T* from = x + (i / packs * packs + (long long)i) * 8;
    const Some<T, 8> value = load<T, 8>(from);
    const Some<T, 8> gate = load<T, 8>(from + width);
    Some<T, 8> made;
    #pragma unroll
    for (int e = 0; e < 8; e++) {
      const float g = static_cast<float>(gate.of[e]);
      made.of[e] = static_cast<T>(static_cast<float>(value.of[e]) * g / (1.0f + exp2f(-1.44269504f * g)));
    }
    *reinterpret_cast<Some<T, 8>*>(out + i * 8ll) = made;
  }
}

// x (rows, C) times w (columns, C) transposed, in sums (parts, rows, columns) over as many parts of C, each by tiles of
// 64 rows and 128 columns, 32 of each a warp. 64 channels at a time come in, STAGES of them under way.
// All blocks wait for each other first, since all have made x; meanwhile the first weights come.
template <typename T>
__device__ __noinline__ void product(const T* x, const T* w, float* out, int rows, int C, int columns, int parts,
                                     void* memory, const unsigned int* arrivals) {
  constexpr int BM = 64;
  constexpr int BN = 128;
  constexpr int STAGES = 4;
  T* stages = reinterpret_cast<T*>(memory);
  const int thread = threadIdx.x;
  const int lane = thread & 31;
  const int warp_row = thread / 32 % 2 * 32;
  const int warp_column = thread / 64 * 32;
  const int row_blocks = (rows + BM - 1) / BM;
  const int tiles = row_blocks * ((columns + BN - 1) / BN);
  auto load_lines = [&](const T* from, T* to, int lines, int first, int most, int block) {
    #pragma unroll
    for (int i = 0; i < lines / 32; i++) {
      const int r = thread / 8 + i * 32;
      const bool there = first + r < most;
      const T* at = from + (there ? (long long)(first + r) * C : 0) + block * 64 + (thread & 7) * 8;
      copy_async(to + r * 64 + ((thread ^ r) & 7) * 8, at, there);
    }
  };
  auto stage = [&](int block) { return stages + block % STAGES * (BM + BN) * 64; };
  int first_row, first_column, part, first, last;
  auto load_x = [&](int block) { load_lines(x, stage(block), BM, first_row, rows, block); };
  auto load_w = [&](int block) { load_lines(w, stage(block) + BM * 64, BN, first_column, columns, block); };
  auto begin = [&](int tile) {
    first_row = tile % row_blocks * BM;
    first_column = tile % tiles / row_blocks * BN;
    part = tile / tiles;
    first = C / 64 * part / parts;
    last = part < parts ? C / 64 * (part + 1) / parts : first;
    __syncthreads();
    #pragma unroll
    for (int s = 0; s < STAGES - 1; s++)
      if (first + s < last) load_w(first + s);
  };
  begin(blockIdx.x);
  wait_for_all(arrivals);
  for (int tile = blockIdx.x; tile < tiles * parts; tile += gridDim.x) {
    if (tile != blockIdx.x) begin(tile);
    #pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
      if (first + s < last) load_x(first + s);
      close_group();
    }
    float sums[2][4][4];
    #pragma unroll
    for (int i = 0; i < 2; i++)
      #pragma unroll
      for (int j = 0; j < 4; j++)
        #pragma unroll
        for (int e = 0; e < 4; e++) sums[i][j][e] = 0.0f;
    for (int block = first; block < last; block++) {
      wait_groups<STAGES - 2>();
      __syncthreads();
      if (block + STAGES - 1 < last) {
        load_x(block + STAGES - 1);
        load_w(block + STAGES - 1);
      }
      close_group();
      const T* a = stage(block);
      const T* b = a + BM * 64;
      #pragma unroll
      for (int k = 0; k < 4; k++) {
        unsigned int fa[2][4];
        unsigned int fb[2][4];
        #pragma unroll
        for (int i = 0; i < 2; i++) {
          const int r = warp_row + i * 16 + (lane & 15);
          load_fragments(fa[i], a + r * 64 + ((2 * k + lane / 16) ^ (r & 7)) * 8);
        }
        #pragma unroll
        for (int j = 0; j < 2; j++) {
          const int r = warp_column + j * 16 + (lane & 7) + lane / 16 * 8;
          load_fragments(fb[j], b + r * 64 + ((2 * k + (lane >> 3 & 1)) ^ (r & 7)) * 8);
        }
        #pragma unroll
        for (int i = 0; i < 2; i++)
          #pragma unroll
          for (int j = 0; j < 4; j++)
            multiply_add(sums[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1], x);
      }
    }
    #pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = first_row + warp_row + i * 8 + lane / 4;
      #pragma unroll
      for (int j = 0; j < 4; j++) {
        const int column = first_column + warp_column + j * 8 + 2 * (lane & 3);
        const Some<float, 2> two{sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]};
        if (row < rows && column < columns)
          *reinterpret_cast<Some<float, 2>*>(out + ((long long)part * rows + row) * columns + column) = two;
      }
    }
  }
}

template <typename T>
struct Heads { const T* of; int row; };  // the first head of the first row, and how many numbers a row has

// Attention of `heads` heads of queries (B * length rows) to kv_heads of keys and values (B * count rows). A block of
// threads makes 16 * ROWS_OF_WARPS queries of one head of one clip at a time; keys and values pass in tiles of 64, two
// under way, each shared among GROUPS groups of warps. If q has none, queries are the sums of PARTS parts, normed if
// there is a norm.
template <typename T, int D, int ROWS_OF_WARPS, int PARTS, typename X>
__device__ __noinline__ void attend(Heads<T> q, Heads<X> parts, Norm<T> norm, Heads<T> k, Heads<T> v, T* out,
                                    int batches, int length, int count, int heads, int kv_heads, float scale,
                                    void* memory) {
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
  auto load_lines = [&](T* to, const T* from, int lines, int first, int most, int stride) {
    const int c = thread % CHUNKS;
    #pragma unroll
    for (int i = 0; i < lines * CHUNKS / (32 * WARPS); i++) {
      const int r = thread / CHUNKS + i * (32 * WARPS / CHUNKS);
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
      load_lines(to, k.of + batch * count * k.row + kv_head * D, 64, index * 64, count, k.row);
      load_lines(to + TILE, v.of + batch * count * v.row + kv_head * D, 64, index * 64, count, v.row);
    };
    __syncthreads();
    if (q.of) load_lines(queries, q.of + batch * length * q.row + head * D, ROWS, first_row, length, q.row);
    load_keys_values(0);
    close_group();
    if (!q.of) {
      #pragma unroll
      for (int i = 0; i < ROWS / (4 * WARPS); i++) {
        const int r = thread / 8 + i * 4 * WARPS;
        const long long row = batch * length + min(first_row + r, length - 1);
        float numbers[CHUNKS] = {};
        #pragma unroll
        for (int part = 0; part < PARTS; part++)
          add(numbers, parts.of + (part * batches * length + row) * parts.row + head * D + (thread & 7) * CHUNKS);
        norm_head(numbers, norm);
        #pragma unroll
        for (int c = 0; c < D / 64; c++) {
          Some<T, 8> made;
          #pragma unroll
          for (int e = 0; e < 8; e++) made.of[e] = static_cast<T>(numbers[c * 8 + e]);
          *reinterpret_cast<Some<T, 8>*>(queries + r * D + (((thread & 7) * (D / 64) + c) ^ (r & 7)) * 8) = made;
        }
      }
    }
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
          multiply_add(scores[2 * j], fq[c], fk[0], fk[1], k.of);
          multiply_add(scores[2 * j + 1], fq[c], fk[2], fk[3], k.of);
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
        const float base = GROUPS > 1 && peak == -INFINITY ? 0.0f : peak;  // a group may have seen no key
        float sum = 0.0f;
        #pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
          #pragma unroll
          for (int e = 0; e < 2; e++) {
            float& s = scores[j][2 * h + e];
            s = exp2f(s - base);
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
          multiply_add(sums[2 * j], weights, fv[0], fv[1], k.of);
          multiply_add(sums[2 * j + 1], weights, fv[2], fv[3], k.of);
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
