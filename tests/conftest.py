"""A small model of random weights, every part real: what the runtime does with any model can be tested on it."""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # the bounds are for full float32, also on a GPU

# isort: split

import mlx_audio_native  # noqa: F401  before mlx.core, so that an installed OpenBLAS is used

# isort: split

import copy
import io
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_on_cpu
import mlx.core as mx
import pytest
import sentencepiece
from hypothesis import settings

from mlx_audio_native import Model, cuda, load
from mlx_audio_native.conditioning import Conditioner
from mlx_audio_native.config import ModelConfig
from mlx_audio_native.dit import DiT
from mlx_audio_native.names import entries
from mlx_audio_native.oobleck import Autoencoder
from mlx_audio_native.weights import save

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

# a shell's background job ignores Ctrl-C, and so would the programs that tests start and stop by it
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = "kick snare drum hi-hat loop sine tone saw bass square lead plucked string rising falling BPM C D E F G A B #"
OOBLECK = {"channels": 4, "c_mults": [2, 4], "strides": [4, 8], "use_snake": True}
# 188 latent frames of 32 samples at 1 kHz: a window of 6.016 s
CONFIG = {
    "model_type": "diffusion_cond",
    "sample_size": 6016,
    "sample_rate": 1000,
    "audio_channels": 2,
    "model": {
        "pretransform": {
            "type": "autoencoder",
            "config": {
                "encoder": {"type": "oobleck", "config": {"in_channels": 2, "latent_dim": 16, **OOBLECK}},
                "decoder": {
                    "type": "oobleck",
                    "config": {"out_channels": 2, "latent_dim": 8, **OOBLECK, "final_tanh": False},
                },
                "bottleneck": {"type": "vae"},
                "latent_dim": 8,
                "downsampling_ratio": 32,
                "io_channels": 2,
            },
        },
        "conditioning": {
            "configs": [
                {
                    "id": "prompt",
                    "type": "t5",
                    "config": {
                        "max_length": 64,
                        "t5_config": {
                            "vocab_size": 100,
                            "d_model": 32,
                            "d_kv": 16,
                            "num_heads": 2,
                            "num_layers": 2,
                            "d_ff": 48,
                        },
                    },
                },
                {"id": "seconds_total", "type": "number", "config": {"min_val": 0, "max_val": 256}},
            ],
            "cond_dim": 32,
        },
        "diffusion": {
            "type": "dit",
            "cross_attention_cond_ids": ["prompt", "seconds_total"],
            "global_cond_ids": ["seconds_total"],
            "diffusion_objective": "rf_denoiser",
            "config": {
                "io_channels": 8,
                "embed_dim": 64,
                "depth": 2,
                "num_heads": 2,
                "cond_token_dim": 32,
                "global_cond_dim": 32,
            },
        },
        "io_channels": 8,
    },
}


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Called, it lets the runtime take the forms that are for a GPU, on any machine and without a compiler."""
    mx.disable_compile()
    yield lambda: monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    mx.enable_compile()


@pytest.fixture(scope="session")
def kernel_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch, kernel_libraries: Path) -> list[str]:
    """Lets CUDA kernels run, without a GPU by way of g++; lists the names of those that do."""
    used, build = [], cuda.build
    if not cuda.is_default():
        if sys.platform != "linux" or not shutil.which("g++"):
            pytest.skip("needs an NVIDIA GPU, or Linux and g++")
        monkeypatch.setattr(cuda, "is_default", lambda: True)
        monkeypatch.setattr(cuda, "capability", lambda: 8)
        monkeypatch.setattr(cuda, "processors", lambda: 3)
        build = cuda_on_cpu.build(kernel_libraries)

    def counted(name: str, *rest: Any, **more: Any) -> Callable[..., list[mx.array]]:
        kernel = build(name, *rest, **more)
        return lambda **call: used.append(name) or kernel(**call)

    monkeypatch.setattr(cuda, "build", counted)
    return used


@pytest.fixture(scope="session")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with T5's special tokens where T5 has them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20),
        model_writer=model,
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory, spiece: Path) -> Callable[..., Path]:
    """Writes a model folder: `make_folder(edit)` lets `edit` change the config in place beforehand."""

    def make(edit: Callable[[dict[str, Any]], None] = lambda config: None) -> Path:
        values = copy.deepcopy(CONFIG)
        edit(values)
        config = ModelConfig.from_dict(values)
        frequencies = {number.id: 16 for number in config.numbers}
        modules = Conditioner(config.conditioning, frequencies), DiT(config.dit), Autoencoder(config.autoencoder)
        shapes = {entry.source: entry.shape for module in modules for entry in entries(module)}
        tensors = {}
        for name, key in zip(shapes, mx.random.split(mx.random.key(0), len(shapes)), strict=True):
            fan_in = mx.array(shapes[name][1:]).prod().item() if len(shapes[name]) > 1 else 4
            tensors[name] = mx.random.normal(shapes[name], key=key) / fan_in**0.5
        folder = tmp_path_factory.mktemp("model") / "small"
        save(folder, values, tensors, spiece)
        return folder

    return make


@pytest.fixture(scope="session")
def small_folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder()


@pytest.fixture(scope="session")
def small_model(small_folder: Path) -> Model:
    return load(small_folder)
