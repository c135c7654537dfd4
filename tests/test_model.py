"""Loading and generating, on a small model of random weights."""

import logging
import shutil
import warnings
from weakref import ref

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_audio_native import load, model
from mlx_audio_native.errors import InputError, MlxAudioError

PROMPTS = ["kick drum", "saw bass lead, rising", "sine"]


def with_objective(name):
    def edit(config):
        config["model"]["diffusion"]["diffusion_objective"] = name

    return edit


@pytest.fixture(scope="module")
def guided_model(make_folder):
    """rectified_flow: made for guidance, so that its scale is no cause for a warning."""
    return load(make_folder(with_objective("rectified_flow")))


@settings(max_examples=30)
@given(st.floats(0.0006, 6.016))
def test_frames_are_the_seconds_times_the_rate(small_model, seconds):
    audio = small_model.generate("kick", seconds=seconds, steps=1, seed=0)
    assert audio.samples.shape == (round(seconds * 1000), 2)
    assert audio.samples.dtype == np.float32 and audio.sample_rate == 1000


def test_defaults_are_four_seconds_and_what_the_objective_wants(small_model, guided_model):
    recipe = small_model.generate("kick").recipe
    assert (recipe.seconds, recipe.steps, recipe.sampler, recipe.cfg_scale) == (4, 8, "pingpong", 1)
    recipe = guided_model.generate("kick", seconds=1).recipe
    assert (recipe.steps, recipe.sampler, recipe.cfg_scale) == (50, "euler", 7)


def test_a_short_window_is_the_default_length(make_folder):
    model = load(make_folder(lambda config: config.update(sample_size=2048)))
    assert len(model.generate("kick", steps=1).samples) == 2048


def test_compiling_changes_nothing_on_a_cpu(small_folder, small_model):
    compiled = load(small_folder).compile()
    samples = [model.generate("kick", seconds=1, seed=1).samples for model in (small_model, compiled)]
    assert np.array_equal(*samples)
    assert load(small_folder, parts=["dit"]).compile().dit.compiles


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling on a CPU takes g++")
def test_a_compiled_clip_is_the_clip(make_folder, guided_model, monkeypatch):
    """The forms for a GPU, compiled, all on the CPU."""
    options = {"seconds": 1.0, "steps": 3, "cfg_scale": 3.0, "negative_prompt": "hi-hat", "seed": 5}
    expected = guided_model.generate(PROMPTS[:2], **options)
    model = load(make_folder(with_objective("rectified_flow"))).compile().compile()
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    for found, clip in zip(model.generate(PROMPTS[:2], **options), expected, strict=True):
        assert np.linalg.norm(found.samples - clip.samples) < 1e-4 * np.linalg.norm(clip.samples)
    parts = [ref(part) for part in (model.dit, model.autoencoder, model.conditioner.t5)]
    del model, found, clip
    assert not any(part() for part in parts)


@pytest.mark.parametrize("sampler", ["pingpong", "euler", "rk4", "dpmpp"])
def test_a_batch_equals_its_clips_alone(guided_model, sampler):
    options = {"steps": 3, "sampler": sampler, "cfg_scale": 3.0, "negative_prompt": "hi-hat"}
    seconds, seeds = [1.0, 2.5, 0.3], [5, 6, 5]
    together = guided_model.generate(PROMPTS, seconds=seconds, seed=seeds, **options)
    for prompt, length, seed, clip in zip(PROMPTS, seconds, seeds, together, strict=True):
        alone = guided_model.generate(prompt, seconds=length, seed=seed, **options)
        assert alone.recipe == clip.recipe
        assert np.linalg.norm(alone.samples - clip.samples) < 1e-4 * np.linalg.norm(alone.samples)
        assert clip.samples.flags.owndata  # and keeps no other clip in memory


def test_the_same_seed_is_the_same_clip_and_another_is_another(small_model):
    first, again, other = (small_model.generate("kick", seconds=1, seed=seed).samples for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_one_value_serves_every_clip_of_a_batch(small_model):
    clips = small_model.generate(PROMPTS, seconds=1, seed=3, steps=1)
    assert [clip.recipe.seed for clip in clips] == [3, 3, 3]
    clips = small_model.generate("kick", seconds=[1, 2], seed=[1, 2], steps=1)
    assert [(clip.recipe.prompt, clip.recipe.seconds, clip.recipe.seed) for clip in clips] == [
        ("kick", 1, 1),
        ("kick", 2, 2),
    ]
    (clip,) = small_model.generate(["kick"], steps=1)
    assert clip.recipe.prompt == "kick"


def test_a_seed_is_drawn_for_each_clip_and_makes_it_again(small_model):
    clips = small_model.generate(["kick", "kick"], seconds=1, steps=2)
    assert clips[0].recipe.seed != clips[1].recipe.seed
    again = small_model.generate("kick", seconds=1, steps=2, seed=clips[1].recipe.seed)
    np.testing.assert_allclose(again.samples, clips[1].samples, rtol=1e-4, atol=1e-3)


def test_what_is_asked_for_changes_the_sound(guided_model):
    plain = {"prompt": "kick", "seconds": 1.0, "seed": 1, "steps": 3, "cfg_scale": 3.0}
    base = guided_model.generate(**plain).samples
    changes = {
        "prompt": "snare",
        "negative_prompt": "sine",
        "cfg_scale": 1.0,
        "sampler": "rk4",
        "steps": 4,
        "seconds": 1.1,
    }
    for name, value in changes.items():
        changed = guided_model.generate(**plain | {name: value}).samples[: len(base)]
        assert np.abs(changed - base).max() > 1e-3 * np.abs(base).max(), name


def test_guidance_with_null_is_the_definition(guided_model):
    """One Euler step from t = 1 is x - v, with v = vu + s·(vc - vu), and vu heard with all tokens zero."""
    seed, scale = 4, 2.5
    *_, last = guided_model.sample("kick", seconds=2, steps=1, cfg_scale=scale, seed=seed)
    encoded = guided_model.conditioner.encode(*guided_model.tokenizer.encode(["kick"]), seconds_total=[2.0])
    noise = mx.random.normal((188, 8), key=mx.random.split(mx.random.key(seed))[1])[None]
    at, tokens = mx.ones((1,)), encoded.cross_attention
    conditional = guided_model.dit(noise, at, tokens, encoded.global_cond)
    unconditional = guided_model.dit(noise, at, mx.zeros_like(tokens), encoded.global_cond)
    expected = noise - (unconditional + scale * (conditional - unconditional))
    np.testing.assert_allclose(np.array(last.latents), np.array(expected), rtol=1e-4, atol=1e-4)


def test_sample_yields_every_step_of_the_whole_window(small_model):
    states = list(small_model.sample(PROMPTS, seconds=[1, 2, 3], steps=5, seed=0))
    assert [(state.step, state.steps) for state in states] == [(i, 5) for i in range(1, 6)]
    assert all(state.latents.shape == (3, 188, 8) for state in states)
    whole = np.array(small_model.autoencoder.decode(states[-1].latents))
    for clip, samples in zip(small_model.generate(PROMPTS, seconds=[1, 2, 3], steps=5, seed=0), whole, strict=True):
        np.testing.assert_allclose(clip.samples, samples[: len(clip.samples)], atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("strides", [[4, 8], [3, 5], [8, 2], [1, 7]])
@given(frames=st.integers(1, 400))
def test_no_latent_that_a_clip_needs_is_left_out(oobleck_of, strides, frames):
    autoencoder, latents, whole = oobleck_of(tuple(strides))
    needed = autoencoder.config.latents_for(frames)
    part = np.array(autoencoder.decode(latents[:, :needed]))
    assert autoencoder.config.decoded_frames(latents.shape[1]) == whole.shape[1]
    np.testing.assert_allclose(part[:, :frames], whole[:, :frames], atol=1e-5 * np.abs(whole).max())


@pytest.fixture(scope="module")
def oobleck_of(make_folder):
    made = {}

    def make(strides):
        if strides not in made:

            def edit(config):
                section = config["model"]["pretransform"]["config"]
                section["downsampling_ratio"] = int(np.prod(strides))
                for coder in ("encoder", "decoder"):
                    section[coder]["config"]["strides"] = list(strides)

            autoencoder = load(make_folder(edit), parts=("autoencoder",)).autoencoder
            latents = mx.random.normal((1, 100, 8), key=mx.random.key(1))
            made[strides] = autoencoder, latents, np.array(autoencoder.decode(latents))
        return made[strides]

    return make


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": 3}, "the prompt must be text"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"prompt": []}, "a batch needs"),
        ({"prompt": ["kick", ""]}, "the prompt is empty"),
        ({"seconds": 0}, "seconds must be above 0"),
        ({"seconds": -1}, "seconds must be above 0"),
        ({"seconds": 1e-5}, "seconds must be above 0"),
        ({"seconds": float("nan")}, "seconds must be a finite number"),
        ({"seconds": float("inf")}, "seconds must be a finite number"),
        ({"seconds": "long"}, "seconds must be a number"),
        ({"seconds": 3601}, "seconds must be at most 3600, not 3601"),
        ({"seconds": 1e308}, "seconds must be at most 3600"),
        ({"seconds": [1, 2], "seed": [1, 2, 3]}, "found 2 lengths, 3 seeds"),
        ({"steps": 0}, "steps must be from 1 to"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2**64}, "seed must be from 0 to"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be a finite number"),
        ({"negative_prompt": "sine"}, "negative prompt does nothing at cfg_scale 1"),
        ({"negative_prompt": "", "cfg_scale": 2}, "the negative prompt is empty"),
        ({"sampler": "ddim"}, "unknown sampler 'ddim'.*pingpong"),
    ],
)
def test_bad_input_ends_in_one_sentence(small_model, options, problem):
    for method in (small_model.generate, small_model.sample):
        with pytest.raises(InputError, match=problem) as caught:
            method(**{"prompt": "kick"} | options)
        assert "\n" not in str(caught.value)


def test_the_longest_and_shortest_clips_are_made(small_model):
    assert len(small_model.generate("kick", seconds=6.016, steps=1).samples) == 6016
    assert len(small_model.generate("kick", seconds=0.001, steps=1).samples) == 1


def test_guidance_of_an_rf_denoiser_is_warned_of_in_one_line(small_model, guided_model):
    with pytest.warns(UserWarning, match="cfg_scale 3") as caught:
        small_model.generate("kick", seconds=1, steps=1, cfg_scale=3)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guided_model.generate("kick", seconds=1, steps=1, cfg_scale=3)
        small_model.generate("kick", seconds=1, steps=1)


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what(small_model):
    start = " ".join(["kick"] * 64)
    with pytest.warns(UserWarning, match="longer than 64 tokens.*kick snare'") as caught:
        cut = small_model.generate(f"{start} snare", seconds=1, steps=1, seed=0)
    assert len(caught) == 1 and len(str(caught[0].message)) < len(start) + 100
    with pytest.warns(UserWarning, match="sine"):
        other = small_model.generate(f"{start} sine", seconds=1, steps=1, seed=0)
    assert np.array_equal(cut.samples, other.samples)
    assert cut.recipe.prompt == f"{start} snare"


def test_a_prompt_cropped_after_the_encoder_is_warned_of_too(make_folder):
    def encode_more(config):
        config["model"]["conditioning"]["configs"][0]["config"]["encode_length"] = 128

    model = load(make_folder(encode_more))
    start = " ".join(["kick"] * 16)
    assert model.tokenizer.encode([start])[1].sum() == 64 + 1  # and the end token
    with pytest.warns(UserWarning, match="longer than 64 tokens, so this is not heard: 'snare'"):
        model.generate(f"{start} snare", seconds=1, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(start, seconds=1, steps=1)


def with_two_numbers(config):
    with_objective("v")(config)
    conditioning, diffusion = config["model"]["conditioning"], config["model"]["diffusion"]
    ids = ["seconds_start", "seconds_total"]
    conditioning["configs"][1:] = [{**conditioning["configs"][1], "id": id_} for id_ in ids]
    diffusion.update(cross_attention_cond_ids=["prompt", *ids], global_cond_ids=ids)
    diffusion["config"]["global_cond_dim"] *= 2


@pytest.fixture(scope="module")
def v_model(make_folder):
    """As stable-audio-open-1.0: the objective v, seconds_start and seconds_total."""
    return load(make_folder(with_two_numbers))


def test_the_objective_v_has_defaults_of_its_own(v_model):
    audio = v_model.generate("kick", seconds=6.016, seed=0)
    recipe = audio.recipe
    assert (recipe.steps, recipe.sampler, recipe.cfg_scale) == (100, "dpmpp-3m-sde", 7)
    assert audio.samples.shape == (6016, 2)
    short = v_model.generate("kick", seconds=0.001, steps=2, sampler="v-ddim")
    assert short.samples.shape == (1, 2)


@pytest.mark.parametrize("sampler", ["dpmpp-3m-sde", "dpmpp-2m", "v-ddim"])
def test_a_batch_under_the_objective_v_equals_its_clips_alone(v_model, sampler):
    # guidance of 7 makes 2e-4 of what rounding leaves between batch sizes on these random weights
    options = {"steps": 4, "sampler": sampler, "negative_prompt": "hi-hat", "cfg_scale": 2}
    together = v_model.generate(PROMPTS, seconds=[1.0, 2.5, 0.3], seed=[5, 6, 5], **options)
    for clip in together:
        recipe = clip.recipe
        alone = v_model.generate(recipe.prompt, seconds=recipe.seconds, seed=recipe.seed, **options)
        assert alone.recipe == recipe
        assert np.linalg.norm(alone.samples - clip.samples) < 1e-4 * np.linalg.norm(alone.samples)


def test_seconds_start_is_zero_and_both_seconds_are_heard(v_model):
    """One v-ddim step from t = 1 is -v."""
    *_, last = v_model.sample("kick", seconds=2, steps=1, cfg_scale=1, seed=4, sampler="v-ddim")
    noise = mx.random.normal((188, 8), key=mx.random.split(mx.random.key(4))[1])[None]
    ids, mask = v_model.tokenizer.encode(["kick"])
    for start, total, same in ((0.0, 2.0, True), (1.0, 2.0, False), (0.0, 3.0, False)):
        encoded = v_model.conditioner.encode(ids, mask, seconds_start=[start], seconds_total=[total])
        expected = -v_model.dit(noise, mx.ones((1,)), encoded.cross_attention, encoded.global_cond)
        assert np.allclose(np.array(last.latents), np.array(expected), rtol=1e-4, atol=1e-4) == same


@pytest.mark.parametrize(("made_for", "sampler"), [("v", "pingpong"), ("rf_denoiser", "v-ddim")])
def test_samplers_of_another_objective_are_refused(v_model, small_model, made_for, sampler):
    model, own = {"v": (v_model, "dpmpp-3m-sde, dpmpp-2m, v-ddim"), "rf_denoiser": (small_model, "pingpong, euler")}[
        made_for
    ]
    with pytest.raises(InputError, match=f"'{sampler}' is not for this model.*objective {made_for} are {own}"):
        model.generate("kick", sampler=sampler)


def test_rk4_is_refused_where_the_reference_would_shift_its_times(make_folder):
    model = load(make_folder(lambda config: config["model"]["diffusion"].update(distribution_shift_options={})))
    assert model.generate("kick", steps=1, sampler="euler").samples.any()
    with pytest.raises(InputError, match="rk4.*distribution_shift_options"):
        model.generate("kick", steps=1, sampler="rk4")


def test_generating_takes_all_parts(small_folder):
    model = load(small_folder, parts=("conditioner", "dit"))
    assert model.autoencoder is None
    with pytest.raises(InputError, match="conditioner, dit, autoencoder"):
        model.generate("kick")


def test_a_folder_without_a_tokenizer_takes_no_text(make_folder):
    folder = make_folder()
    (folder / "spiece.model").unlink()
    with pytest.raises(InputError, match=r"spiece\.model"):
        load(folder).generate("kick")


@pytest.mark.parametrize("name", ["dit", "autoencoder"])
def test_nan_is_an_error(small_folder, name):
    model = load(small_folder)
    part = getattr(model, name)
    leaf = part.project_out if name == "dit" else part.decoder.layers[0]
    leaf.weight = leaf.weight * float("nan")
    with pytest.raises(MlxAudioError, match="NaN"):
        model.generate("kick", seconds=1)


def test_the_recipe_names_the_model_by_folder_and_hash(small_model, small_folder):
    import hashlib

    recipe = small_model.generate("kick", seconds=1, steps=1).recipe
    assert recipe.model == "small"
    assert recipe.model_sha256 == hashlib.sha256((small_folder / "model.safetensors").read_bytes()).hexdigest()


def test_stages_are_logged(small_model, caplog):
    with caplog.at_level(logging.INFO, "mlx_audio_native"):
        small_model.generate("kick", seconds=1, steps=1)
    assert [message.split("  ")[0] for message in caplog.messages] == ["text and seconds", "sampling", "decoding"]


def test_on_an_nvidia_gpu_twice_as_much_memory_stays_as_was_in_use(monkeypatch):
    """But never more than somebody else allows."""
    limits = [2**40]
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: limits.append(limit) or limits[-2])
    monkeypatch.setattr(model, "_kept", 2**32)
    for peak, kept in ((2**30, 2**32), (2**33, 2**34), (2**31, 2**34)):
        monkeypatch.setattr(mx, "get_peak_memory", lambda peak=peak: peak)
        model._bound_cache()
        assert limits[-1] == kept
    limits.append(2**20)
    model._bound_cache()
    assert limits[-1] == 2**20
