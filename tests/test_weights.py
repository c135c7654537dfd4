"""Model folders: every tensor is used, weight norm fused, damage named, and a folder written whole or not at all."""

import copy
import json
import shutil
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from mlx_audio_native.conditioning import Conditioner
from mlx_audio_native.config import PARTS, ModelConfig
from mlx_audio_native.dit import DiT
from mlx_audio_native.errors import ConfigError, InputError, MlxAudioError, TokenizerError, WeightsError
from mlx_audio_native.names import entries
from mlx_audio_native.oobleck import Autoencoder
from mlx_audio_native.tensorfile import open_tensors, write_tensors
from mlx_audio_native.weights import load_parts, read_tensors, save

Tensors = dict[str, Any]
T5 = "conditioner.conditioners.prompt.model."
SECONDS = "conditioner.conditioners.seconds_total.embedder.embedding."
QKV = "model.model.transformer.layers.1.self_attn.to_qkv.weight"
FIRST_CONV = "pretransform.model.decoder.layers.0"
WEIGHT_NORM = ("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")


@pytest.fixture(scope="module")
def tensors(small_folder: Path) -> Tensors:
    return read_tensors(small_folder)


@pytest.fixture
def write(tmp_path: Path, small_folder: Path) -> Callable[[Tensors], Path]:
    """Writes a model folder with other tensors, unchecked."""

    def write(tensors: Tensors) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(small_folder, folder, dirs_exist_ok=True)
        write_tensors(folder / "model.safetensors", tensors)
        return folder

    return write


def write_raw(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


def same(a: Any, b: Any) -> bool:
    return all(mx.array_equal(x, y).item() for x, y in zip(a, b, strict=True))


# what is in a folder


def test_the_release_has_the_tensors_that_are_asked_for():
    """stable-audio-open-small: 382 for the DiT with a rotary buffer, 365 for the autoencoder as g and v, 3 seconds."""
    config = copy.deepcopy(CONFIG)
    oobleck = {"channels": 128, "c_mults": [1, 2, 4, 8, 16], "strides": [2, 4, 4, 8, 8]}
    section = config["model"]["pretransform"]["config"]
    section["encoder"]["config"] |= {**oobleck, "latent_dim": 128}
    section["decoder"]["config"] |= {**oobleck, "latent_dim": 64}
    section |= {"latent_dim": 64, "downsampling_ratio": 2048}
    dit = {"io_channels": 64, "embed_dim": 1024, "depth": 16, "num_heads": 8, "cond_token_dim": 768}
    config["model"]["diffusion"]["config"] = {**dit, "global_cond_dim": 768, "attn_kwargs": {"qk_norm": "ln"}}
    config["model"] |= {"io_channels": 64}
    config["model"]["conditioning"]["cond_dim"] = 768
    config["model"]["conditioning"]["configs"][0]["config"] = {"t5_model_name": "t5-base", "max_length": 64}
    read = ModelConfig.from_dict(config)
    shapes = {entry.source: entry.shape for entry in entries(DiT(read.dit))}
    assert len(shapes) + 1 == 382
    buffers = sum(prod(shape) for name, shape in shapes.items() if name.endswith("beta"))
    assert sum(map(prod, shapes.values())) - buffers == 340_879_488
    names = [entry.source for entry in entries(Autoencoder(read.autoencoder))]
    assert len(names) + sum(name.endswith(".weight") for name in names) == 365
    conditioner = Conditioner(read.conditioning, {"seconds_total": 128})
    shapes = {entry.source: entry.shape for entry in entries(conditioner) if not entry.source.startswith(T5)}
    assert shapes == {f"{SECONDS}0.weights": (128,), f"{SECONDS}1.weight": (768, 257), f"{SECONDS}1.bias": (768,)}


def test_every_parameter_is_heard(small_folder: Path):
    """A weight that is loaded but plays no part is as good as dropped."""
    loaded = load_parts(small_folder, dtype="float32")
    rng = np.random.default_rng(0)
    shapes = (1, 6, 8), (1, 192, 2), (1, 4, 32), (1, 32)
    latents, audio, tokens, vector = (mx.array(rng.standard_normal(shape)) for shape in shapes)
    ids, mask = loaded.tokenizer.encode(["kick snare drum"])
    sounds = [
        (loaded.conditioner, lambda: loaded.conditioner.encode(ids, mask, seconds_total=3)),
        (loaded.dit, lambda: loaded.dit(latents, mx.array([0.3]), tokens, vector)),
        (loaded.autoencoder, lambda: (loaded.autoencoder.decode(latents), loaded.autoencoder.encode(audio))),
    ]
    for module, run in sounds:
        before = run()
        for name, parameter in tree_flatten(module.parameters()):
            noise = mx.array(rng.standard_normal(parameter.shape))
            module.update(tree_unflatten([(name, parameter + noise)]))
            assert not same(before, run()), name
            module.update(tree_unflatten([(name, parameter)]))
        assert same(before, run())


@given(data=st.data(), newer=st.booleans())
def test_weight_norm_is_fused(tmp_path_factory, data, newer):
    """`g·v/‖v‖`, the norm over all axes but the first, under either pair of names."""
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * data.draw(st.integers(2, 3))))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    g, v = rng.standard_normal((shape[0],) + (1,) * (len(shape) - 1)), rng.standard_normal(shape)
    pair = WEIGHT_NORM[newer]
    path = tmp_path_factory.getbasetemp() / "pair.safetensors"
    arrays = {f"a.{pair[0]}": g, f"a.{pair[1]}": v, "a.bias": np.zeros(1)}
    tensors = {name: array.astype(np.float32) for name, array in arrays.items()}
    write_tensors(path, tensors)
    stored = open_tensors(path)
    assert set(stored) == {"a.weight", "a.bias"}
    expected = np.stack([g[row] * v[row] / np.linalg.norm(v[row]) for row in range(len(v))])
    assert np.allclose(np.array(stored["a.weight"].read()), expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("names", WEIGHT_NORM)
def test_a_checkpoint_with_weight_norm_loads_as_the_fused_one(tensors, write, small_folder, names):
    split = {}
    for name, tensor in tensors.items():
        if name.startswith("pretransform") and name.endswith(".weight"):
            norm = mx.sqrt(mx.square(tensor).sum((1, 2), keepdims=True))
            layer = name.removesuffix("weight")
            split |= {layer + names[0]: norm, layer + names[1]: tensor * 3.0}
        else:
            split[name] = tensor
    loaded = load_parts(write(split), ["autoencoder"], "float32").autoencoder
    expected = load_parts(small_folder, ["autoencoder"], "float32").autoencoder
    for (name, found), (_, fused) in zip(tree_flatten(loaded), tree_flatten(expected), strict=True):
        assert mx.allclose(found, fused, rtol=1e-6, atol=1e-7).item(), name


def test_dtypes_of_the_stages(small_folder: Path):
    for asked, expected in (("float16", mx.float16), ("bfloat16", mx.bfloat16), ("float32", mx.float32)):
        loaded = load_parts(small_folder, dtype=asked)
        assert loaded.autoencoder.dtype == loaded.dit.project_out.weight.dtype == expected
        assert {value.dtype for _, value in tree_flatten(loaded.conditioner.parameters())} == {mx.float32}
    with pytest.raises(ConfigError, match="did you mean 'float16'"):
        load_parts(small_folder, dtype="flaot16")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_files_in_half_precision(tensors, write, dtype):
    halved = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    loaded = load_parts(write(halved), dtype="float32")
    assert mx.array_equal(loaded.dit.blocks[1].self_attention.to_qkv.weight, halved[QKV].astype(mx.float32))


# what is not in order


def break_missing(tensors: Tensors) -> Tensors:
    return without(tensors, QKV)


def break_renamed(tensors: Tensors) -> Tensors:
    return {**without(tensors, QKV), QKV.replace("to_qkv", "to_qvk"): tensors[QKV]}


def break_extra(tensors: Tensors) -> Tensors:
    return {**tensors, "model.model.transformer.layers.2.self_attn.to_qkv.weight": tensors[QKV]}


def break_elsewhere(tensors: Tensors) -> Tensors:
    return {**tensors, "diffusion_ema.ema_model.weight": tensors[QKV]}


def break_shape(tensors: Tensors) -> Tensors:
    return {**tensors, QKV: tensors[QKV].T}


def break_transposed_kernel(tensors: Tensors) -> Tensors:
    name = f"{FIRST_CONV}.weight"
    return {**tensors, name: tensors[name].transpose(0, 2, 1)}


def break_nan(tensors: Tensors) -> Tensors:
    broken = np.array(tensors[QKV])
    broken[3, 4] = np.nan
    return {**tensors, QKV: broken}


def break_infinite_snake(tensors: Tensors) -> Tensors:
    name = "pretransform.model.decoder.layers.1.layers.0.beta"
    return {**tensors, name: mx.full(tensors[name].shape, float("inf"))}


def break_half_pair(tensors: Tensors) -> Tensors:
    name = f"{FIRST_CONV}.weight"
    return {**without(tensors, name), f"{name}_v": tensors[name]}


def break_weight_twice(tensors: Tensors) -> Tensors:
    name = f"{FIRST_CONV}.weight"
    return {**tensors, f"{name}_g": tensors[name][:, :1, :1], f"{name}_v": tensors[name]}


def break_magnitude(tensors: Tensors) -> Tensors:
    name = f"{FIRST_CONV}.weight"
    return {**without(tensors, name), f"{name}_g": tensors[name][0], f"{name}_v": tensors[name]}


def break_tied_table(tensors: Tensors) -> Tensors:
    return {**tensors, f"{T5}encoder.embed_tokens.weight": tensors[f"{T5}shared.weight"] + 1}


def break_frequencies(tensors: Tensors) -> Tensors:
    return {**tensors, f"{SECONDS}0.weights": tensors[f"{SECONDS}0.weights"][:-1]}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_missing, [f"lacks the tensor '{QKV}', expected (192, 64)"]),
        (break_renamed, [f"lacks the tensor '{QKV}'", "did you mean", "to_qvk"]),
        (break_extra, ["no place: 'model.model.transformer.layers.2.self_attn.to_qkv.weight'"]),
        (break_elsewhere, ["no place: 'diffusion_ema.ema_model.weight'"]),
        (break_shape, [f"tensor '{QKV}' in", "is (64, 192), expected (192, 64)"]),
        (break_transposed_kernel, [f"tensor '{FIRST_CONV}.weight' in", "expected (16, 8, 7)"]),
        (break_nan, [f"tensor '{QKV}' in", "not finite"]),
        (break_infinite_snake, ["decoder.layers.1.layers.0.beta' in", "not finite"]),
        (break_half_pair, [f"lacks the tensor '{FIRST_CONV}.weight'"]),
        (break_weight_twice, [f"no place: '{FIRST_CONV}.weight_g', '{FIRST_CONV}.weight_v'"]),
        (break_magnitude, [f"tensor '{FIRST_CONV}.weight_g' in", "expected (16, 1, 1)"]),
        (break_tied_table, [f"'{T5}encoder.embed_tokens.weight'"]),
        (break_frequencies, [f"tensor '{SECONDS}1.weight' in", "(32, 33), expected (32, 31)"]),
    ],
)
def test_damaged_tensors_are_named(tensors, write, damage, said):
    folder = write(damage(tensors))
    with pytest.raises(WeightsError) as refused:
        load_parts(folder)
    for words in [*said, "model.safetensors"]:
        assert words in str(refused.value)


def test_values_too_large_for_half_precision(tensors, write):
    folder = write({**tensors, QKV: tensors[QKV] * 1e6})
    load_parts(folder, dtype="float32")
    with pytest.raises(WeightsError, match="not finite in .*float16"):
        load_parts(folder, dtype="float16")


@pytest.mark.parametrize(("dtype", "size"), [("I32", 4), ("F64", 8), ("F8_E4M3", 1), ("BOOL", 1)])
def test_dtypes_that_are_no_weights(tmp_path: Path, dtype: str, size: int):
    path = tmp_path / "model.safetensors"
    write_raw(path, {"a": {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * size]}}, bytes(3 * size))
    with pytest.raises(WeightsError, match=f"'a' in .* is {dtype}, expected one of F32, F16, BF16"):
        open_tensors(path)["a"].read()


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_an_error_or_other_values(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    whole = {"a.weight_g": np.ones((2, 1)), "a.weight_v": np.ones((2, 3)), "b": np.ones(5)}
    write_tensors(path, {name: array.astype(np.float16) for name, array in whole.items()})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place : place + data.draw(st.integers(1, 30))]
        else:
            content[place:place] = data.draw(st.binary(min_size=1, max_size=4))
        content = content or bytearray(b"{")
    path.write_bytes(content)
    try:
        for stored in open_tensors(path).values():
            mx.eval(stored.read())
    except WeightsError as error:
        assert str(path) in str(error)


def test_files_that_are_no_safetensors(small_folder: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], b"PK" + whole, whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="not a whole safetensors file"):
            load_parts(folder)
    path.unlink()
    with pytest.raises(WeightsError, match="cannot read"):
        load_parts(folder)


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin", "last.pt", "model.pth"])
def test_pickles_are_refused_with_advice(small_folder: Path, tmp_path: Path, name: str):
    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    (folder / "model.safetensors").rename(folder / name)
    for place in (folder, folder / name):
        with pytest.raises(WeightsError, match="is a pickle, which can run code"):
            load_parts(place)


# parts, and T5 beside a release


def test_parts_that_are_not_asked_for_are_not_checked(tensors, write):
    folder = write({name: tensor for name, tensor in tensors.items() if name.startswith("conditioner.")})
    (folder / "spiece.model").unlink()
    loaded = load_parts(folder, ["conditioner"])
    assert (loaded.tokenizer, loaded.dit, loaded.autoencoder) == (None, None, None)
    assert loaded.conditioner.encode([[5, 1]], [[1, 1]], seconds_total=2).global_cond.shape == (1, 32)
    for parts in (["dit"], ["autoencoder"], PARTS):
        with pytest.raises(WeightsError, match="lacks the tensor"):
            load_parts(folder, parts)


@pytest.fixture
def release(tensors, write) -> Path:
    """As published: no T5 in the checkpoint, a rotary buffer, and T5's own folder beside, decoder and all."""
    folder = write(
        {
            **{name: tensor for name, tensor in tensors.items() if not name.startswith(T5)},
            "model.model.transformer.rotary_pos_emb.inv_freq": mx.ones((16,)),
        }
    )
    beside = folder / "text_encoder"
    beside.mkdir()
    text = {name.removeprefix(T5): tensor for name, tensor in tensors.items() if name.startswith(T5)}
    text |= {"encoder.embed_tokens.weight": text["shared.weight"], "lm_head.weight": mx.ones((3, 3))}
    text |= {"decoder.block.0.layer.0.SelfAttention.q.weight": mx.ones((2, 2))}
    write_tensors(beside / "model.safetensors", text)
    config = json.loads((folder / "config.json").read_text())
    t5_config = config["model"]["conditioning"]["configs"][0]["config"].pop("t5_config")
    (beside / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True, **t5_config}))
    (folder / "config.json").rename(folder / "model_config.json")
    (folder / "model_config.json").write_text(json.dumps(config))
    (folder / "spiece.model").rename(beside / "spiece.model")
    return folder


def test_a_release_with_t5_beside_it(release, small_folder):
    loaded, expected = load_parts(release), load_parts(small_folder)
    text = ["kick drum loop"]
    assert same(loaded.tokenizer.encode(text), expected.tokenizer.encode(text))
    ids, mask = loaded.tokenizer.encode(text)
    assert same(*(parts.conditioner.encode(ids, mask, seconds_total=1) for parts in (loaded, expected)))
    assert read_tensors(release).keys() == read_tensors(small_folder).keys()


def test_damage_beside_a_release_names_its_file(release, tensors):
    path = release / "text_encoder" / "model.safetensors"
    text = {name.removeprefix(T5): tensor for name, tensor in tensors.items() if name.startswith(T5)}
    write_tensors(path, without(text, "encoder.final_layer_norm.weight"))
    with pytest.raises(WeightsError, match=f"{path} lacks the tensor .*final_layer_norm"):
        load_parts(release)


def test_a_release_without_t5(release):
    (release / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no text encoder here: put T5's"):
        load_parts(release)
    assert load_parts(release, ["dit"]).conditioner is None


def test_a_vocabulary_larger_than_the_table(tensors, write):
    rows = 20
    folder = write({**tensors, f"{T5}shared.weight": tensors[f"{T5}shared.weight"][:rows]})
    config = json.loads((folder / "config.json").read_text())
    config["model"]["conditioning"]["configs"][0]["config"]["t5_config"]["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="T5's table only 20 rows"):
        load_parts(folder)


# saving


def test_what_is_saved_is_what_is_read(tmp_path, tensors, spiece):
    mixed = {name: tensor.astype(mx.bfloat16 if ".ff." in name else mx.float16) for name, tensor in tensors.items()}
    mixed[QKV] = np.array(tensors[QKV])
    save(tmp_path / "saved", CONFIG, mixed, spiece)
    read = read_tensors(tmp_path / "saved")
    assert all(read[name].dtype == mx.array(mixed[name]).dtype for name in tensors)
    assert all(mx.array_equal(read[name], mx.array(mixed[name])).item() for name in tensors)
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == CONFIG
    assert (tmp_path / "saved" / "spiece.model").read_bytes() == spiece.read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]


def test_equal_tensors_give_equal_bytes(tmp_path, tensors):
    save(tmp_path / "a", CONFIG, tensors)
    save(tmp_path / "b", CONFIG, dict(reversed(tensors.items())))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_one_part_can_be_saved_alone(tmp_path, tensors):
    config = copy.deepcopy(CONFIG)
    config["model"].pop("pretransform")
    save(tmp_path / "part", config, {k: v for k, v in tensors.items() if k.startswith("conditioner.")})
    assert load_parts(tmp_path / "part", ["conditioner"]).conditioner is not None


def test_an_existing_folder_is_kept_unless_asked_for(tmp_path, tensors):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="exists already"):
        save(folder, CONFIG, tensors)
    assert (folder / "mine.txt").read_text() == "kept"
    save(folder, CONFIG, tensors, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("broken", ["tensors", "config", "spiece", "place"])
def test_a_folder_is_written_whole_or_not_at_all(tmp_path, tensors, broken):
    folder = tmp_path / "none" / "model" if broken == "place" else tmp_path / "model"
    with pytest.raises(MlxAudioError):
        save(
            folder,
            {**CONFIG, "sample_rat": 1} if broken == "config" else CONFIG,
            break_shape(tensors) if broken == "tensors" else tensors,
            tmp_path / "missing.model" if broken == "spiece" else None,
        )
    assert list(tmp_path.iterdir()) == []
