"""The model config: what is read, which defaults count, and that nothing unknown or unfitting passes."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIG as SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_audio_native.conditioning import ANGLE_CONSTANTS
from mlx_audio_native.config import ModelConfig, read_config
from mlx_audio_native.errors import ConfigError
from mlx_audio_native.schema import Section
from mlx_audio_native.t5 import T5Config

PRETRANSFORM = ("model", "pretransform", "config")
DIT = ("model", "diffusion", "config")
PROMPT = ("model", "conditioning", "configs", 0, "config")
SECONDS = ("model", "conditioning", "configs", 1, "config")
ABSENT = object()
CONFIG = copy.deepcopy(SMALL)
CONFIG["model"]["conditioning"]["configs"][0]["config"]["max_length"] = 16


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """CONFIG with the value at a path replaced, added, or (ABSENT) taken away."""
    config = copy.deepcopy(CONFIG)
    section = config
    for key in path[:-1]:
        section = section[key]
    if value is ABSENT:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    return config


def read(path: tuple[Any, ...], value: Any) -> ModelConfig:
    return ModelConfig.from_dict(changed(path, value))


def test_everything_that_others_rely_on():
    config = ModelConfig.from_dict(CONFIG)
    assert (config.sample_rate, config.sample_size, config.audio_channels) == (1000, 6016, 2)
    assert (config.latent_channels, config.downsampling_ratio, config.latent_length) == (8, 32, 188)
    assert (config.prompt.id, config.prompt.max_length, config.prompt.encode_length) == ("prompt", 16, 16)
    assert config.cross_attention_ids == ("prompt", "seconds_total")
    assert config.global_ids == ("seconds_total",)
    assert config.objective == "rf_denoiser"


def test_defaults_are_the_reference_constructors():
    """Each of these has surprised somebody: the release's own config sets most of them."""
    assert read((*PROMPT, "max_length"), ABSENT).prompt.max_length == 128
    assert read(("model", "diffusion", "diffusion_objective"), ABSENT).objective == "v"
    assert read((*PRETRANSFORM, "decoder", "config", "final_tanh"), ABSENT).autoencoder.decoder.final_tanh is True
    assert read((*PRETRANSFORM, "decoder", "config", "use_snake"), ABSENT).autoencoder.decoder.use_snake is False
    number = read(("model", "conditioning", "configs", 1, "config"), {}).numbers[0]
    assert (number.min, number.max, number.scale) == (0, 1, None)
    assert (number.features, number.angle_constants) == (("x", "sin", "cos"), ANGLE_CONSTANTS)
    assert T5Config.read(Section({}, "t5")) == T5Config(32128, 512, 64, 2048, 6, 8, False, 32, 128, 1e-6)
    dit = ModelConfig.from_dict(CONFIG).dit
    assert (dit.qk_norm, dit.norm_eps, dit.ff_dim, dit.cond_embed_dim) == (False, 1e-5, 4 * 64, 64)


def test_key_value_heads_follow_from_the_tokens_width():
    config = changed((*DIT, "project_cond_tokens"), False)
    dit = ModelConfig.from_dict(config).dit
    assert (dit.num_heads, dit.kv_heads, dit.head_dim, dit.rotary_dim) == (2, 1, 32, 32)
    projected = ModelConfig.from_dict(CONFIG).dit
    assert projected.kv_heads == projected.num_heads


def test_additions_to_the_schema():
    prompt = read((*PROMPT, "encode_length"), 24).prompt
    assert (prompt.max_length, prompt.encode_length) == (16, 24)
    number = read(SECONDS, {"max_val": 9, "features": ["cos", "x"], "scale": 0.25, "angle_constants": []}).numbers[0]
    assert (number.features, number.scale, number.angle_constants) == (("cos", "x"), 0.25, ())
    assert number.width(16) == 17


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("sample_rates",), 44100, "unknown key 'sample_rates' in config; did you mean 'sample_rate'?"),
        ((*DIT, "embed_dims"), 64, "unknown key 'embed_dims' in model.diffusion.config; did you mean 'embed_dim'?"),
        ((*DIT, "attn_kwargs"), {"qk_nrom": "ln"}, "'qk_nrom' in model.diffusion.config.attn_kwargs; did you mean"),
        ((*PROMPT, "maxlength"), 3, "unknown key 'maxlength' in model.conditioning.configs[0].config"),
        ((*PROMPT, "t5_config", "d_modle"), 3, "unknown key 'd_modle'"),
        ((*PRETRANSFORM, "decoder", "config", "use_snakes"), True, "did you mean 'use_snake'?"),
        (("model", "pretransform", "scales"), 1.0, "did you mean 'scale'?"),
        (("model", "loRA"), {}, "unknown key 'loRA' in model"),
        (("sample_rate",), ABSENT, "config lacks 'sample_rate'"),
        (("sample_rate",), "44100", "config.sample_rate must be a whole number, found '44100'"),
        (("sample_rate",), True, "must be a whole number"),
        (("sample_rate",), 0, "must be from 1 to"),
        ((*DIT, "embed_dim"), 10**9, "must be from 1 to"),
        ((*SECONDS, "max_val"), float("nan"), "must be a finite number"),
        ((*SECONDS, "max_val"), 0, "min_val 0, which is not below max_val 0"),
        ((*SECONDS, "features"), ["x", "tan"], "must be different ones of x, sin and cos"),
        ((*SECONDS, "features"), ["x", "x"], "must be different ones of x, sin and cos"),
        ((*PROMPT, "encode_length"), 8, "encode_length 8 is below max_length 16"),
        ((*PROMPT, "t5_config", "feed_forward_proj"), "gelu", "cannot be honoured"),
        ((*PROMPT, "t5_config", "dense_act_fn"), "silu", "cannot be honoured"),
        ((*DIT, "global_cond_type"), "adaLN", "global_cond_type 'adaLN' cannot be honoured, only \"prepend\""),
        ((*DIT, "attn_kwargs"), {"qk_norm": "l2"}, "qk_norm 'l2' cannot be honoured"),
        ((*DIT, "num_memory_tokens"), 64, "cannot be honoured"),
        ((*DIT, "num_heads"), 3, "embed_dim 64 does not give 3 heads"),
        ((*DIT, "num_heads"), 4, "heads of 16 cannot be rotated"),
        ((*DIT, "cond_token_dim"), 64, "conditioning.cond_dim is 32, the DiT's cond_token_dim 64"),
        ((*DIT, "global_cond_dim"), 64, "cond_dim times the 1 of global_cond_ids is 32, the DiT's global_cond_dim 64"),
        ((*DIT, "io_channels"), 16, "sizes do not fit: model.io_channels is 8, the DiT's io_channels 16"),
        (("model", "diffusion", "diffusion_objective"), "rf_denoise", "did you mean 'rf_denoiser'?"),
        (("model", "diffusion", "input_concat_ids"), ["audio"], "cannot be honoured"),
        (("model", "diffusion", "global_cond_ids"), ["seconds_totl"], "did you mean 'seconds_total'?"),
        (("model", "diffusion", "global_cond_ids"), ["prompt"], "has the text, which is no vector"),
        (("model", "conditioning", "configs", 1, "id"), "prompt", "two conditioners of one id"),
        (("model", "conditioning", "configs", 1, "type"), "int", "type 'int' cannot be honoured"),
        (("model", "conditioning", "configs"), [], "0 t5 conditioners"),
        (("model", "diffusion", "cross_attention_cond_ids"), ["seconds_total"], "'prompt' feeds nothing"),
        ((*PRETRANSFORM, "downsampling_ratio"), 64, "downsampling_ratio is 64, expected 32"),
        ((*PRETRANSFORM, "latent_dim"), 4, "encoder latent_dim is 16, expected 8"),
        ((*PRETRANSFORM, "bottleneck"), {"type": "rvq"}, "cannot be honoured"),
        ((*PRETRANSFORM, "decoder", "type"), "seanet", "cannot be honoured"),
        ((*PRETRANSFORM, "decoder", "config", "strides"), [4], "2 c_mults, 1 strides"),
        ((*PRETRANSFORM, "encoder", "config", "strides"), [4, 4], "multiply to a ratio that is 16"),
        (("audio_channels",), 1, "audio_channels is 1, the autoencoder's 2"),
        (("sample_size",), 31, "sample_size 31 is below a latent frame of 32"),
        (("model_type",), "diffusion_uncond", "model_type 'diffusion_uncond' cannot be honoured"),
        (("model",), [], "model must be an object"),
    ],
)
def test_refusals_name_the_key_and_the_section(path: tuple[Any, ...], value: Any, said: str):
    with pytest.raises(ConfigError) as refused:
        read(path, value)
    assert said in str(refused.value)


def test_known_keys_without_effect():
    config = changed(("training",), {"anything": ["at", "all"]})
    config["model"]["pretransform"] |= {"model_half": True, "iterate_batch": True, "chunked": False}
    config["model"]["pretransform"]["config"]["encoder"]["requires_grad"] = False
    config["model"]["diffusion"] |= {"prepend_cond_ids": [], "distribution_shift_options": None}
    config["model"]["diffusion"]["config"] |= {
        "transformer_type": "continuous_transformer",
        "norm_kwargs": {"bias": True},
    }
    assert ModelConfig.from_dict(config) == ModelConfig.from_dict(CONFIG)


def test_a_distribution_shift_is_told_apart():
    assert not ModelConfig.from_dict(CONFIG).dit.shifts_distribution
    assert read(("model", "diffusion", "distribution_shift_options"), {"min_length": 4}).dit.shifts_distribution


def test_parts_that_are_not_asked_for_are_not_checked():
    config = changed(("model", "pretransform"), {"type": "wavelet"})
    config["model"]["diffusion"] |= {"type": "unet", "config": None}
    del config["sample_rate"]
    read_alone = ModelConfig.from_dict(config, ["conditioner"])
    assert read_alone.conditioning == ModelConfig.from_dict(CONFIG).conditioning
    assert (read_alone.dit, read_alone.autoencoder) == (None, None)
    with pytest.raises(ConfigError, match="unknown part 'decoder'"):
        ModelConfig.from_dict(CONFIG, ["decoder"])


def test_t5_by_name_and_by_hugging_face_config():
    config = changed((*PROMPT, "t5_config"), ABSENT)
    base = ModelConfig.from_dict(config).prompt
    assert (base.t5_config.d_model, base.t5_config.num_layers, base.project_out) == (768, 12, True)
    published = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_ff": 7}
    published |= {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new", "n_positions": 9}
    beside = ModelConfig.from_dict(config, text_encoder=published).prompt
    assert (beside.t5_config.d_ff, beside.t5_config.gated, beside.project_out) == (7, True, False)
    own = ModelConfig.from_dict(CONFIG, text_encoder=published).prompt
    assert own.t5_config.d_ff == 48
    config["model"]["conditioning"]["configs"][0]["config"]["t5_model_name"] = "t5-bass"
    with pytest.raises(ConfigError, match="did you mean 't5-base'"):
        ModelConfig.from_dict(config)
    with pytest.raises(ConfigError, match="200 buckets do not fit"):
        T5Config.read(Section({"relative_attention_num_buckets": 200, "relative_attention_max_distance": 50}, "t5"))


def test_of_two_config_files_the_diffusion_model_counts(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "autoencoder"}))
    (tmp_path / "model_config.json").write_text(json.dumps(CONFIG))
    assert read_config(tmp_path) == ModelConfig.from_dict(CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"\ud800"', "[" * 10_000, '{"model_type": NaN}'])
def test_files_that_are_no_config(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(ConfigError):
        read_config(tmp_path)


def test_folders_without_config(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds neither"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        read_config(tmp_path / "nowhere")


def paths(section: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(section, dict | list):
        for key in section if isinstance(section, dict) else range(len(section)):
            yield from paths(section[key], (*path, key))


scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@settings(max_examples=300)
@given(path=st.sampled_from([path for path in paths(CONFIG) if path]), value=st.just(ABSENT) | values)
def test_any_value_anywhere_is_read_or_refused(path: tuple[Any, ...], value: Any):
    try:
        config = read(path, value)
    except ConfigError as error:
        assert len(str(error)) < 400
    else:
        assert config.latent_length >= 1
