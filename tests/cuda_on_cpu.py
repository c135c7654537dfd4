"""mx.fast.cuda_kernel without a GPU: the kernels' sources compiled by g++ with cuda_on_cpu.h."""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

HARDWARE = Path(__file__).with_suffix(".h")
GUARD = 256  # bytes
TYPES = {mx.float16: "_Float16", mx.float32: "float", mx.uint32: "unsigned"}


def build(folder: Path) -> Callable[..., Callable[..., list[mx.array]]]:
    """What takes the place of cuda.build; libraries lie in the folder."""

    def build(name, inputs, outputs, source, header="", shared_memory=0):
        def call(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            names = [*input_names, *outputs]
            kinds = [TYPES[array.dtype] for array in inputs] + [TYPES[dtype] for dtype in output_dtypes]
            parameters = [f"{kind}* {name}" for name, kind in zip(names, kinds, strict=True)]
            parameters += [f"const int* {name}_shape" for name in input_names]
            given = [f"({kind}*)data[{i}]" for i, kind in enumerate(kinds)]
            given += [f"shapes + {4 * i}" for i in range(len(inputs))]
            constants = [
                f"  using {key} = {TYPES[value]};"
                if isinstance(value, mx.Dtype)
                else f"  constexpr int {key} = {value:d};"
                for key, value in template
            ]
            blocks = [-(-size // group) for size, group in zip(grid, threadgroup, strict=True)]
            text = f"""#include "{HARDWARE.name}"
{header}
void kernel({", ".join(parameters)}) {{
{chr(10).join(constants)}
{source.replace("extern __shared__ __align__(128) unsigned char memory[];", "")}}}
extern "C" void run(void** data, const int* shapes) {{
  run_blocks({blocks[0]}, {blocks[1]}, {threadgroup[0]}, {shared_memory}, {str("wait_for_all" in source).lower()},
             [&] {{ kernel({", ".join(given)}); }});
}}
"""
            made = [
                np.full(shape, np.nan, np.float16 if dtype == mx.float16 else np.float32)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            run(library(text), [np.array(array, order="C") for array in inputs] + made)
            return [mx.array(array) for array in made]

        input_names = inputs
        return call

    def library(text: str) -> Path:
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not (header := folder / HARDWARE.name).exists():
            # compiled once, since it takes longer than a kernel
            shutil.copy(HARDWARE, header)
            compile_by_gxx("-x", "c++-header", header)
        if not path.exists():
            path.with_suffix(".cpp").write_text(text)
            compile_by_gxx("-shared", "-o", path, path.with_suffix(".cpp"))
        return path

    return build


def compile_by_gxx(*arguments: str | Path) -> None:
    options = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-fPIC"]
    subprocess.run(["g++", *options, *arguments], check=True)


def run(library: Path, arrays: Sequence[np.ndarray]) -> None:
    """With guards around the arrays, which nothing may write to."""
    guarded = [np.full(array.nbytes + 2 * GUARD, 0xA5, np.uint8) for array in arrays]
    for buffer, array in zip(guarded, arrays, strict=True):
        buffer[GUARD:-GUARD] = array.reshape(-1).view(np.uint8)
    pointers = (ctypes.c_void_p * len(arrays))(*(buffer.ctypes.data + GUARD for buffer in guarded))
    sizes = sum(((*array.shape, 1, 1, 1)[:4] for array in arrays), ())
    ctypes.CDLL(str(library)).run(pointers, (ctypes.c_int * len(sizes))(*sizes))
    for buffer, array in zip(guarded, arrays, strict=True):
        assert (buffer[:GUARD] == 0xA5).all() and (buffer[-GUARD:] == 0xA5).all()
        array.reshape(-1).view(np.uint8)[:] = buffer[GUARD:-GUARD]
