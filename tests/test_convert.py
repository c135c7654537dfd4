"""Published checkpoints become model folders: whole or not at all, every tensor accounted for, errors in a sentence."""

import copy
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG

from mlx_audio_native import load
from mlx_audio_native.cli import main
from mlx_audio_native.convert import Recovered, convert
from mlx_audio_native.errors import ConfigError, InputError, MlxAudioError, TokenizerError, WeightsError
from mlx_audio_native.quantization import Quantization
from mlx_audio_native.tensorfile import open_tensors, write_tensors
from mlx_audio_native.weights import load_parts, read_tensors

T5 = "conditioner.conditioners.prompt.model."
INV_FREQ = "model.model.transformer.rotary_pos_emb.inv_freq"
QKV = "model.model.transformer.layers.1.self_attn.to_qkv"
SECONDS = "conditioner.conditioners.seconds_total.embedder.embedding.1.weight"
T5_CONFIG = CONFIG["model"]["conditioning"]["configs"][0]["config"]["t5_config"]


@pytest.fixture(scope="module")
def tensors(small_folder):
    return read_tensors(small_folder)


@pytest.fixture
def checkpoint(tmp_path, tensors, spiece):
    """As published: DiT in float32, autoencoder in float16 with weight norm as g and v, a rotary buffer, no T5."""
    stored = {INV_FREQ: mx.ones((16,))}
    for name, tensor in tensors.items():
        if name.startswith("pretransform") and name.endswith(".weight"):
            norm = mx.sqrt(mx.square(tensor).sum((1, 2), keepdims=True))
            stored |= {f"{name}_g": norm.astype(mx.float16), f"{name}_v": (tensor * 2).astype(mx.float16)}
        elif not name.startswith(T5):
            stored[name] = tensor
    folder = tmp_path / "release"
    folder.mkdir()
    write_tensors(folder / "model.safetensors", stored)
    config = copy.deepcopy(CONFIG)
    del config["model"]["conditioning"]["configs"][0]["config"]["t5_config"]
    (folder / "model_config.json").write_text(json.dumps(config))
    (folder / "LICENSE.md").write_text("terms")
    (folder / "NOTICE").write_text("notice")
    return folder


@pytest.fixture
def t5(tmp_path, tensors, spiece):
    """A T5's own folder, its decoder and a second copy of the table included."""
    folder = tmp_path / "t5"
    folder.mkdir()
    text = {name.removeprefix(T5): tensor for name, tensor in tensors.items() if name.startswith(T5)}
    text |= {"encoder.embed_tokens.weight": text["shared.weight"], "lm_head.weight": mx.ones((3, 3))}
    text |= {"decoder.block.0.layer.0.SelfAttention.q.weight": mx.ones((2, 2))}
    write_tensors(folder / "model.safetensors", text)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True, **T5_CONFIG}))
    shutil.copyfile(spiece, folder / "spiece.model")
    (folder / "LICENSE").write_text("T5's terms")
    return folder


def rewrite(folder, edit):
    """Let `edit` change a file's tensors in place."""
    path = folder / "model.safetensors"
    raw = mx.load(str(path))
    mx.eval(raw)
    edit(raw)
    write_tensors(path, raw)


def configure(folder, edit):
    path = folder / "model_config.json"
    config = json.loads(path.read_text())
    edit(config["model"])
    path.write_text(json.dumps(config))


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# what comes out


def test_a_release_becomes_one_folder(checkpoint, t5, tmp_path, small_folder, capsys):
    before = {path: path.read_bytes() for path in [*checkpoint.iterdir(), *t5.iterdir()]}
    output = tmp_path / "model"
    assert main(["convert", str(checkpoint), "--output", str(output), "--text-encoder", str(t5)]) == 0
    lines = capsys.readouterr().out
    count = len(open_tensors(checkpoint / "model.safetensors")) + sum(
        name.endswith("_g") for name in mx.load(str(checkpoint / "model.safetensors"))
    )
    assert f"{count - 1} tensors used, 1 ignored by name" in lines
    assert "3 ignored by name" in lines
    names = ["LICENSE.md", "NOTICE", "config.json", "model.safetensors", "spiece.model", "text_encoder-LICENSE"]
    assert tree(output) == names
    assert {path: path.read_bytes() for path in [*checkpoint.iterdir(), *t5.iterdir()]} == before
    shutil.rmtree(checkpoint)
    shutil.rmtree(t5)
    found, expected = read_tensors(output), read_tensors(small_folder)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        halved = name.startswith("pretransform") and name.endswith(".weight")
        assert tensor.dtype == mx.float32
        assert mx.allclose(tensor, expected[name], rtol=2e-3 if halved else 0, atol=1e-4 if halved else 0).item(), name
    audio = load(output).generate("kick", seconds=1, steps=1, seed=0)
    assert np.isfinite(audio.samples).all()


def test_where_it_comes_from_is_kept_and_told(checkpoint, t5, tmp_path, capsys):
    sums = [sha256(folder / "model.safetensors") for folder in (checkpoint, t5)]
    convert(checkpoint, tmp_path / "model", text_encoder=t5)
    sources = json.loads((tmp_path / "model" / "config.json").read_text())["provenance"]["sources"]
    assert [source["sha256"] for source in sources] == sums
    assert [source["name"] for source in sources] == ["release", "t5"]
    assert main(["info", str(tmp_path / "model")]) == 0
    told = capsys.readouterr().out
    for fact in (*sums, "licence: 'LICENSE.md', 'NOTICE', 'text_encoder-LICENSE'", "parameters in F32", " MB"):
        assert fact in told


def test_the_same_sources_give_the_same_bytes(checkpoint, t5, tmp_path):
    for name in ("a", "b"):
        convert(checkpoint, tmp_path / name, text_encoder=t5)
    assert all(path.read_bytes() == (tmp_path / "b" / path.name).read_bytes() for path in (tmp_path / "a").iterdir())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(checkpoint, t5, tmp_path, dtype):
    """What would shift the time stays float32."""
    convert(checkpoint, tmp_path / "model", dtype, text_encoder=t5)
    found = read_tensors(tmp_path / "model")
    exact = {name for name, tensor in found.items() if tensor.dtype == mx.float32}
    numbers = {name for name in found if "seconds_total" in name or name.endswith("timestep_features.weight")}
    assert exact == (set(found) if dtype == "float32" else numbers)
    assert {str(tensor.dtype) for tensor in found.values()} == {"mlx.core.float32", f"mlx.core.{dtype}"}
    load_parts(tmp_path / "model", dtype="float32")


def test_t5_beside_the_checkpoint_is_found(checkpoint, t5, tmp_path):
    t5.rename(checkpoint / "text_encoder")
    convert(checkpoint, tmp_path / "model")
    assert load(tmp_path / "model").tokenizer is not None
    assert not (tmp_path / "model" / "text_encoder").exists()


def test_a_model_folder_can_be_converted_and_its_t5_replaced(small_folder, t5, tmp_path, tensors):
    source = tmp_path / "source"
    shutil.copytree(small_folder, source)
    rewrite(source, lambda t: t.update({f"{T5}encoder.embed_tokens.weight": t[f"{T5}shared.weight"]}))
    convert(source, tmp_path / "half", "float16")
    assert read_tensors(tmp_path / "half")[f"{QKV}.weight"].dtype == mx.float16
    rewrite(t5, lambda text: text.update({"encoder.final_layer_norm.weight": mx.full((32,), 3.0)}))
    convert(small_folder, tmp_path / "other", text_encoder=t5)
    found = read_tensors(tmp_path / "other")
    assert mx.array_equal(found[f"{T5}encoder.final_layer_norm.weight"], mx.full((32,), 3.0))
    assert mx.array_equal(found[f"{QKV}.weight"], tensors[f"{QKV}.weight"])


def test_what_was_recovered_elsewhere(small_folder, tmp_path, tensors, spiece):
    files = [tmp_path / "dit.tflite"]
    files[0].write_bytes(b"graph")
    arrays = {name: np.array(tensor) for name, tensor in tensors.items()}
    convert(Recovered(tmp_path, files, CONFIG, arrays), tmp_path / "model", "float16", tokenizer=spiece)
    assert load(tmp_path / "model").generate("kick", seconds=1, steps=1).samples.shape == (1000, 2)
    (source,) = json.loads((tmp_path / "model" / "config.json").read_text())["provenance"]["sources"]
    assert source["sha256"] == sha256(files[0])


# quantised


@pytest.fixture(params=[(8, 0.02), (4, 0.25)])
def quantised(request, checkpoint, t5, tmp_path):
    bits, bound = request.param
    convert(checkpoint, tmp_path / "quantised", quantization=Quantization(bits, 32), text_encoder=t5)
    convert(checkpoint, tmp_path / "plain", text_encoder=t5)
    return tmp_path / "quantised", tmp_path / "plain", bits, bound


def test_quantised_weights_are_near_and_the_rest_equal(quantised, capsys):
    folder, plain, bits, bound = quantised
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == {"bits": bits, "group_size": 32, "parts": ["conditioner", "dit"]}
    found, expected = read_tensors(folder), read_tensors(plain)
    for name, tensor in expected.items():
        if found[name].dtype != mx.uint32:
            assert mx.array_equal(found[name], tensor), name
            continue
        layer = name.removesuffix("weight")
        weight = mx.dequantize(found[name], found[layer + "scales"], found[layer + "biases"], 32, bits)
        assert mx.linalg.norm(weight - tensor) < bound / 2 * mx.linalg.norm(tensor), name
    packed = {name.split(".")[-2] for name, tensor in found.items() if tensor.dtype == mx.uint32}
    assert packed == {"to_qkv", "to_out", "to_q", "to_kv", "proj", "2", "q", "k", "v", "o", "wi"}
    models = [load(path, dtype="float32") for path in (folder, plain)]
    rng = np.random.default_rng(0)
    latents, tokens, vector = (mx.array(rng.standard_normal(s)) for s in ((1, 6, 8), (1, 4, 32), (1, 32)))
    a, b = (model.dit(latents, mx.array([0.3]), tokens, vector) for model in models)
    assert 0 < mx.linalg.norm(a - b).item() < bound * mx.linalg.norm(b).item()
    ids, mask = models[0].tokenizer.encode(["kick snare"])
    a, b = (model.conditioner.encode(ids, mask, seconds_total=2).cross_attention for model in models)
    assert 0 < mx.linalg.norm(a - b).item() < bound * mx.linalg.norm(b).item()
    assert main(["info", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"quantised: {bits} bits in groups of 32" in told and f"parameters in {bits} bits" in told


def test_quantised_folders_load_strictly(quantised):
    folder = quantised[0]
    whole = (folder / "model.safetensors").read_bytes()

    def broken(edit, said):
        rewrite(folder, edit)
        with pytest.raises(WeightsError, match=said):
            load_parts(folder)
        (folder / "model.safetensors").write_bytes(whole)

    broken(lambda t: t.pop(f"{QKV}.scales"), f"lacks the tensor '{QKV}.scales'")
    broken(lambda t: t.pop(f"{QKV}.biases"), f"lacks the tensor '{QKV}.biases'")
    broken(lambda t: t.update({f"{QKV}.weight": mx.ones(t[f"{QKV}.weight"].shape)}), "is F32, expected U32")
    broken(lambda t: t.update({f"{QKV}.scales": t[f"{QKV}.scales"].view(mx.uint32)}), "is U32, expected a float")
    broken(lambda t: t.update({f"{QKV}.scales": t[f"{QKV}.scales"] * float("nan")}), "not finite")
    broken(lambda t: t.update({f"{QKV}.weight": mx.ones((192, 64))}), r"is \(192, 64\), expected")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization"}))
    with pytest.raises(WeightsError, match="no place: .*biases"):
        load_parts(folder)
    for key, value in (("bits", 3), ("group_size", 7), ("parts", ["autoencoder"])):
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization": config["quantization"] | {key: value}})
        )
        with pytest.raises(ConfigError, match=f"quantization.{key}"):
            load_parts(folder)


def test_what_is_quantised_is_not_converted_again(quantised, tmp_path):
    with pytest.raises(InputError, match="is quantised already; convert what it was made of"):
        convert(quantised[0], tmp_path / "again")


# what is refused, one by one


def no_t5(checkpoint, t5):
    shutil.rmtree(t5)
    return [], "release holds no T5: give --text-encoder, a folder or hub id of t5-base"


def t5_of_other_size(checkpoint, t5):
    def edit(model):
        model["conditioning"]["configs"][0]["config"]["t5_model_name"] = "t5-base"

    configure(checkpoint, edit)
    return ["--text-encoder", str(t5)], "is not the T5 of this model: its vocab_size is 100, expected 32128"


def t5_without_weights(checkpoint, t5):
    (t5 / "model.safetensors").unlink()
    return ["--text-encoder", str(t5)], "no text encoder here"


def t5_as_a_pickle(checkpoint, t5):
    (t5 / "model.safetensors").rename(t5 / "pytorch_model.bin")
    return ["--text-encoder", str(t5)], "pytorch_model.bin is a pickle, which can run code"


def t5_without_a_tensor(checkpoint, t5):
    rewrite(t5, lambda text: text.pop("encoder.final_layer_norm.weight"))
    return ["--text-encoder", str(t5)], f"{t5}/model.safetensors lacks the tensor"


def t5_without_a_tokenizer(checkpoint, t5):
    (t5 / "spiece.model").unlink()
    return ["--text-encoder", str(t5)], "there is no tokenizer: "


def pickled(checkpoint, t5):
    (checkpoint / "model.safetensors").rename(checkpoint / "model.ckpt")
    return ["--text-encoder", str(t5)], "model.ckpt is a pickle, which can run code"


def wrong_model(checkpoint, t5):
    (checkpoint / "model_config.json").write_text(json.dumps({"model_type": "diffusion_uncond"}))
    return [
        "--text-encoder",
        str(t5),
    ], "config.model_type 'diffusion_uncond' cannot be honoured, only \"diffusion_cond\""


def wrong_architecture(checkpoint, t5):
    configure(checkpoint, lambda model: model["diffusion"]["config"].update(patch_size=2))
    return ["--text-encoder", str(t5)], "model.diffusion.config.patch_size 2 cannot be honoured, only 1"


def wrong_width(checkpoint, t5):
    configure(checkpoint, lambda model: model["diffusion"]["config"].update(embed_dim=128))
    return ["--text-encoder", str(t5)], "expected (128"


def more_tensors(checkpoint, t5):
    rewrite(checkpoint, lambda t: t.update({f"model.lora.{side}": mx.ones((2, 2)) for side in ("up", "down")}))
    return [
        "--text-encoder",
        str(t5),
    ], "has tensors for which this model has no place: 'model.lora.down', 'model.lora.up'"


def less_tensors(checkpoint, t5):
    rewrite(checkpoint, lambda t: t.pop(f"{QKV}.weight"))
    return ["--text-encoder", str(t5)], f"lacks the tensor '{QKV}.weight'"


def not_finite(checkpoint, t5):
    rewrite(checkpoint, lambda t: t.update({SECONDS: t[SECONDS] * float("inf")}))
    return ["--text-encoder", str(t5)], "has values that are not finite"


def too_large_for_half(checkpoint, t5):
    rewrite(checkpoint, lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"] * 1e7}))
    return ["--text-encoder", str(t5), "--dtype", "float16"], "has values that are not finite in float16"


def cut_short(checkpoint, t5):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    return ["--text-encoder", str(t5)], "is not a whole safetensors file"


def unknown_dtype(checkpoint, t5):
    return ["--text-encoder", str(t5), "--dtype", "flaot16"], "unknown dtype 'flaot16'"


@pytest.mark.parametrize(
    "broken",
    [
        *(no_t5, t5_of_other_size, t5_without_weights, t5_as_a_pickle, t5_without_a_tensor, t5_without_a_tokenizer),
        *(pickled, wrong_model, wrong_architecture, wrong_width, more_tensors, less_tensors, not_finite),
        *(too_large_for_half, cut_short, unknown_dtype),
    ],
)
def test_what_is_refused_is_one_sentence_and_leaves_nothing(checkpoint, t5, tmp_path, capsys, broken):
    options, said = broken(checkpoint, t5)
    before = tree(tmp_path)
    assert main(["convert", str(checkpoint), "--output", str(tmp_path / "model"), *options]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and said in told
    assert tree(tmp_path) == before


def test_a_group_size_without_bits_is_a_wrong_command_line(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        main(["convert", str(checkpoint), "--output", str(tmp_path / "model"), "--q-group-size", "32"])
    assert status.value.code == 2 and "--q-group-size says nothing without --q-bits" in capsys.readouterr().err


def test_groups_that_no_row_divides_into(checkpoint, t5, tmp_path):
    with pytest.raises(InputError, match="no layer has rows that divide into groups of 128"):
        convert(checkpoint, tmp_path / "model", quantization=Quantization(8, 128, ("conditioner",)), text_encoder=t5)
    assert not (tmp_path / "model").exists()


def test_sources_that_are_not_there(tmp_path, t5):
    with pytest.raises(MlxAudioError, match="is not a folder"):
        convert(tmp_path / "missing", tmp_path / "model", text_encoder=t5)
    with pytest.raises(MlxAudioError, match="holds neither config.json nor"):
        convert(tmp_path, tmp_path / "model", text_encoder=t5)


def test_a_tokenizer_larger_than_the_table(checkpoint, t5, tmp_path):
    rewrite(t5, lambda text: text.update({n: text[n][:20] for n in ("shared.weight", "encoder.embed_tokens.weight")}))
    (t5 / "config.json").write_text(json.dumps({**T5_CONFIG, "vocab_size": 20}))
    with pytest.raises(TokenizerError, match="T5's table only 20 rows"):
        convert(checkpoint, tmp_path / "model", text_encoder=t5)


# where it is written


def test_an_existing_folder_is_kept_unless_it_is_a_model_and_to_be_replaced(checkpoint, t5, tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    for overwrite, said in ((False, "exists already"), (True, "is no model folder, and is kept")):
        with pytest.raises(InputError, match=said):
            convert(checkpoint, output, text_encoder=t5, overwrite=overwrite)
    assert tree(output) == ["mine.txt"]
    convert(checkpoint, tmp_path / "other", text_encoder=t5)
    first = sha256(tmp_path / "other" / "model.safetensors")
    convert(checkpoint, tmp_path / "other", "float16", text_encoder=t5, overwrite=True)
    assert sha256(tmp_path / "other" / "model.safetensors") != first
    with pytest.raises(InputError, match="is what is to be converted, and is kept"):
        convert(tmp_path / "other", tmp_path / "other", overwrite=True)
    with pytest.raises(InputError, match="there is no folder"):
        convert(checkpoint, tmp_path / "none" / "model", text_encoder=t5)


def test_no_room_is_told_before_anything_is_written(checkpoint, t5, tmp_path, monkeypatch):
    before = tree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(WeightsError, match=r"no room for .*it takes .* MB, and 0 MB are free"):
        convert(checkpoint, tmp_path / "model", text_encoder=t5)
    assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_disk_that_fills_up_meanwhile(checkpoint, t5, tmp_path):
    """As a limit on a file's size, which fails the same write."""
    before = tree(tmp_path)
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    code += "from mlx_audio_native.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "convert", checkpoint, "--text-encoder", t5, "--output", tmp_path / "model"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot write ") and result.stderr.count("\n") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(checkpoint, t5, tmp_path, sent):
    """Interrupted while its own half-written folder is there."""
    before = tree(tmp_path)
    output = tmp_path / "model"
    code = """
import sys, time
from mlx_audio_native import weights
write = weights.write_tensors
def slowly(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(60)
weights.write_tensors = slowly
from mlx_audio_native.cli import run
run()
"""
    command = [sys.executable, "-c", code, "convert", checkpoint, "--text-encoder", t5, "--output", output]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    assert len(tree(tmp_path)) > len(before)
    process.send_signal(sent)
    assert process.stderr.read() == "interrupted\n"
    assert process.wait(30) == 130
    assert tree(tmp_path) == before
