"""T5's attention as one CUDA kernel; `Attention` of t5.py is its plain form."""

from __future__ import annotations

import mlx.core as mx

from . import cuda

# a warp for each row of a head: a lane computes the scores of every 32nd key, then every 32nd column of the sum
_ATTENTION = """
  struct alignas(16) Four { float v[4]; };
  extern __shared__ __align__(128) unsigned char memory[];
  float* scores = reinterpret_cast<float*>(memory);
  const int heads = bias_shape[1], length = bias_shape[3], rows = bias_shape[2] * length;
  const int head = blockIdx.x / rows, row = blockIdx.x % rows;
  const float* query = joined + (size_t)blockIdx.x * WIDTH;
  const float* keys = joined + ((size_t)(heads + head) * rows + row / length * length) * WIDTH;
  const float* values = keys + (size_t)heads * rows * WIDTH;
  const float* added = bias + (size_t)blockIdx.x * length;
  float highest = -3.4028235e38f, sum = 0;
  for (int key = threadIdx.x; key < length; key += 32) {
    float score = 0;
    #pragma unroll
    for (int c = 0; c < WIDTH; c += 4) {
      const Four a = *reinterpret_cast<const Four*>(query + c);
      const Four b = *reinterpret_cast<const Four*>(keys + key * WIDTH + c);
      score += a.v[0] * b.v[0] + a.v[1] * b.v[1] + a.v[2] * b.v[2] + a.v[3] * b.v[3];
    }
    scores[key] = score + added[key];
    highest = fmaxf(highest, scores[key]);
  }
  for (int step = 16; step; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, step));
  for (int key = threadIdx.x; key < length; key += 32) {
    scores[key] = expf(scores[key] - highest);
    sum += scores[key];
  }
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  __syncthreads();
  for (int c = threadIdx.x; c < WIDTH; c += 32) {
    float total = 0;
    for (int key = 0; key < length; key++) total += scores[key] * values[key * WIDTH + c];
    out[((size_t)row * heads + head) * WIDTH + c] = total / sum;
  }
"""
_LONGEST = 128  # tokens whose scores a warp keeps


def fits(joined: mx.array, length: int) -> bool:
    """Whether `attend` can do it: an NVIDIA GPU, float32, and not too long."""
    fits = joined.dtype == mx.float32 and joined.shape[2] % 4 == 0 and length <= _LONGEST
    return fits and cuda.is_default()


def attend(joined: mx.array, bias: mx.array) -> mx.array:
    """Queries, keys and values (3·heads, B·L, d), bias (1, heads, B, L, L) → (B·L, heads·d), as one CUDA kernel.

    Scores, softmax, weighted sum and its layout are else four operations, each as long as the host takes to begin it.
    """
    heads, (_, rows, width) = bias.shape[1], joined.shape
    (out,) = cuda.build("t5_attention", ("joined", "bias"), ("out",), _ATTENTION, shared_memory=4 * _LONGEST)(
        inputs=[joined, bias],
        template=[("WIDTH", width)],
        grid=(32 * heads * rows, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(rows, heads * width)],
        output_dtypes=[mx.float32],
    )
    return out
