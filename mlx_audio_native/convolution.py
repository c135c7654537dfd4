"""The convolutions of the autoencoder, all of them as one operation with a few taps."""

from __future__ import annotations

from math import ceil

import mlx.core as mx
import mlx.nn as nn

_BY_PHASES = 512  # channels, from which on cuDNN takes some dilated convolutions by an algorithm 25 times as slow


def convolve(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, dilation: int = 1, padding: int = 0
) -> mx.array:
    """(B, T, in) and weight (out, taps, in) → (B, T + 2·padding - dilation·(taps - 1), out), as mx.conv1d.

    On the CPU as one matrix product a tap: 4 times as fast as mx.conv1d there, 20 to 80 times with OpenBLAS.
    """
    if mx.default_device() != mx.cpu:
        return _convolve_gpu(x, weight, bias, dilation, padding)
    x = mx.pad(x, ((0, 0), (padding, padding), (0, 0))) if padding else x
    # a transposed view would take the slow path of a BLAS without packing
    taps = mx.contiguous(weight.transpose(1, 2, 0))
    length = x.shape[1] - dilation * (len(taps) - 1)
    y = x[:, :length] @ taps[0] if bias is None else mx.addmm(bias, x[:, :length], taps[0])
    for index in range(1, len(taps)):
        start = index * dilation
        y = mx.addmm(y, x[:, start : start + length], taps[index])
    return y


def _convolve_gpu(x: mx.array, weight: mx.array, bias: mx.array | None, dilation: int, padding: int) -> mx.array:
    _, taps, inputs = weight.shape
    if taps == 1 and not padding:
        return x @ weight[:, 0].T if bias is None else mx.addmm(bias, x, weight[:, 0].T)
    if dilation > 1 and inputs >= _BY_PHASES and padding % dilation == 0 and mx.cuda.is_available():
        y = convolve_by_phases(x, weight, dilation, padding)
    else:
        y = mx.conv1d(x, weight, padding=padding, dilation=dilation)
    return y if bias is None else y + bias


def convolve_by_phases(x: mx.array, weight: mx.array, dilation: int, padding: int) -> mx.array:
    """As mx.conv1d, without a dilated convolution; the padding must be a multiple of the dilation.

    Every `dilation`-th frame belongs to one signal, and these signals lie side by side, the columns of an image.
    """
    batch, frames, channels = x.shape
    rows = ceil(frames / dilation)
    x = mx.pad(x, ((0, 0), (0, rows * dilation - frames), (0, 0))).reshape(batch, rows, dilation, channels)
    y = mx.conv2d(x, weight[:, :, None], padding=(padding // dilation, 0)).flatten(1, 2)
    return y[:, : frames + 2 * padding - dilation * (weight.shape[1] - 1)]


class Conv(nn.Module):
    """A convolution that keeps the length; an odd kernel, dilated."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.zeros((outputs, kernel, inputs))
        if bias:
            self.bias = mx.zeros((outputs,))
        self.dilation = dilation

    def __call__(self, x: mx.array) -> mx.array:
        padding = self.dilation * (self.weight.shape[1] // 2)
        return convolve(x, self.weight, self.get("bias"), self.dilation, padding)


class Downsample(nn.Module):
    """A convolution of kernel 2s, stride s and padding ceil(s/2), computed as two taps over blocks of s frames.

    `weight` (out, 2, s·in) is the kernel (out, 2s, in) in another shape.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.weight = mx.zeros((outputs, 2, stride * inputs))
        self.bias = mx.zeros((outputs,))
        self.stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        batch, length, channels = x.shape
        padding = ceil(self.stride / 2)
        blocks = (length + 2 * padding) // self.stride
        x = mx.pad(x, ((0, 0), (padding, padding), (0, 0)))[:, : blocks * self.stride]
        return convolve(x.reshape(batch, blocks, self.stride * channels), self.weight, self.bias)


class Upsample(nn.Module):
    """A transposed convolution of kernel 2s, stride s and padding ceil(s/2): L frames to L·s, less one if s is odd.

    Each block of s frames hears two input frames, so it is one product of both to s·out channels. `weight`
    (s·out, 2, in) is `upsampling_taps` of the kernel.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.weight = mx.zeros((stride * outputs, 2, inputs))
        self.bias = mx.zeros((outputs,))
        self.stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.pad(x, ((0, 0), (1, 1), (0, 0)))
        pairs = mx.concatenate([x[:, :-1], x[:, 1:]], axis=-1)
        y = convolve(pairs, self.weight.reshape(len(self.weight), 1, -1), mx.tile(self.bias, self.stride))
        return y.reshape(len(y), -1, len(self.bias))[:, self.padding : -self.padding]

    @property
    def padding(self) -> int:
        """How many of the blocks' frames are too many at each end."""
        return ceil(self.stride / 2)


def upsampling_taps(kernel: mx.array) -> mx.array:
    """A transposed convolution's kernel (in, out, 2s), as torch stores it, to Upsample's weight (s·out, 2, in).

    The earlier of two input frames is heard through the later half of the kernel.
    """
    inputs, outputs, size = kernel.shape
    halves = kernel.reshape(inputs, outputs, 2, size // 2)[:, :, ::-1]
    return halves.transpose(3, 1, 2, 0).reshape(size // 2 * outputs, 2, inputs)
