"""The two public routes from torch to TFLite: torch.onnx → onnx2tf, and litert-torch. They need an environment each."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn


def onnx2tf_route(
    module: nn.Module,
    sample: tuple[torch.Tensor, ...],
    output: Path,
    precision: str = "float32",
    opset: int = 15,
    simplify: bool = True,
    **options: Any,
) -> None:
    """Write `output` through torch.onnx (legacy exporter) and onnx2tf.

    precision: float32, float16, int8 (dynamic range), or the name of another file that onnx2tf writes beside these.
    """
    import onnx2tf

    # onnx2tf calls the command `onnxsim`, which lies beside this interpreter
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, "conditioners.onnx")
        names = ["input_ids", "attention_mask", *(f"seconds_{i}" for i in range(len(sample) - 2))]
        outputs = ["cross_attention_input", "cross_attention_masks", "global_cond"]
        torch.onnx.export(
            module, sample, str(onnx), input_names=names, output_names=outputs, opset_version=opset, dynamo=False
        )
        onnx2tf.convert(
            input_onnx_file_path=str(onnx),
            output_folder_path=folder,
            output_dynamic_range_quantized_tflite=precision not in ("float32", "float16"),
            not_use_onnxsim=not simplify,
            non_verbose=True,
            **options,
        )
        suffix = "dynamic_range_quant" if precision == "int8" else precision
        shutil.copyfile(Path(folder, f"conditioners_{suffix}.tflite"), output)


def litert_route(module: nn.Module, sample: tuple[torch.Tensor, ...], output: Path, precision: str = "float32") -> None:
    """Write `output` through litert-torch. precision: float32, float16, int8 (dynamic), int8-weights, int4-weights."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe
    from litert_torch.generative.quantize import quant_recipes

    logging.getLogger().setLevel(logging.ERROR)
    recipes = {
        "float16": quant_recipes.full_fp16_recipe,
        "int8": quant_recipes.full_dynamic_recipe,
        "int8-weights": quant_recipes.full_weight_only_recipe,
    }
    config = recipes[precision]() if precision in recipes else None
    with redirect_stdout(io.StringIO()):  # a line for each of its steps
        litert_torch.convert(module, sample, quant_config=config).export(str(output))
        if precision == "int4-weights":
            # litert-torch has no recipe for it, its quantizer has
            quantised = quantizer.Quantizer(str(output), recipe.weight_only_wi4_afp32()).quantize()
            quantised.export_model(str(output), overwrite=True)
