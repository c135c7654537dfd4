"""Models by hub id: the real client in processes of its own, against a server here that answers as the hub does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import soundfile

from mlx_audio_native import load, read_recipe
from mlx_audio_native.hub import name, resolve
from mlx_audio_native.weights import read_tensors, write_tensors

WEIGHTS = "model.safetensors"
TOKEN, EXPIRED = "hf_accepted", "hf_expired"
T5 = "conditioner.conditioners.prompt.model."
# what T5-base's own config.json says beside the sizes
T5_CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
}


@dataclass
class Repository:
    """One commit of files, called main and v1; `gated` asks for a login."""

    files: dict[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(sorted(self.files.values()))).hexdigest()


@dataclass
class Hub:
    """What the server holds, what it was asked for, and after how many bytes of weights it hangs up."""

    repositories: dict[str, Repository]
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    hang_up_after: int | None = None

    def fetched(self) -> set[str]:
        return {path for method, path, _ in self.asked if method == "GET" and not path.startswith("/api/")}


class Handler(BaseHTTPRequestHandler):
    """GET /api/models/ID[/revision/REV]; HEAD and GET /ID/resolve/REV/FILE, weights by way of /cdn/SHA256."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub: Hub = self.server.hub
        hub.asked.append((self.command, self.path, self.headers["Range"]))
        kind, *rest = self.path.strip("/").split("/")
        if self.headers["Authorization"] == f"Bearer {EXPIRED}":
            self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif kind == "cdn":
            blobs = [data for repository in hub.repositories.values() for data in repository.files.values()]
            assert not self.headers["Authorization"]
            self._send_file(next(data for data in blobs if hashlib.sha256(data).hexdigest() == rest[0]))
        elif kind == "api":
            self._list("/".join(rest[1:3]), rest[4] if len(rest) > 3 else "main")
        else:
            self._resolve(f"{kind}/{rest[0]}", rest[2], "/".join(rest[3:]))

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def _list(self, id_: str, revision: str) -> None:
        if repository := self._repository(id_, revision):
            siblings = [{"rfilename": file} for file in repository.files]
            body = json.dumps({"id": id_, "sha": repository.commit, "siblings": siblings}).encode()
            self._send(200, {"Content-Type": "application/json"}, body)

    def _resolve(self, id_: str, revision: str, file: str) -> None:
        repository = self._repository(id_, revision)
        if repository is None:
            return
        if repository.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._refuse(403 if self.headers["Authorization"] else 401, "GatedRepo")
        elif file not in repository.files:
            self._refuse(404, "EntryNotFound")
        else:
            data = repository.files[file]
            commit, digest = {"X-Repo-Commit": repository.commit}, hashlib.sha256(data).hexdigest()
            if file.endswith(WEIGHTS):
                linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
                # on a host of another name, as the hub's is: a login must not go there
                elsewhere = f"http://localhost:{self.server.server_port}/cdn/{digest}"
                self._send(302, {**commit, **linked, "Location": elsewhere})
            else:
                self._send(200, {**commit, "ETag": f'"{digest[:40]}"'}, data)

    def _repository(self, id_: str, revision: str) -> Repository | None:
        repository = self.server.hub.repositories.get(id_)
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", "v1", repository.commit):
            self._refuse(404, "RevisionNotFound")
            return None
        return repository

    def _send_file(self, data: bytes) -> None:
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.headers["Range"] else 0
        span = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self._send(206 if start else 200, span, data[start:], self.server.hub.hang_up_after)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", most: int | None = None) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:most])
            self.close_connection = most is not None


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkpoint_and_t5(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small model as a release has it, without T5; and the T5 as a Hugging Face folder, decoder included."""
    checkpoint, t5 = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("t5")
    tensors = read_tensors(small_folder)
    of_t5 = {key.removeprefix(T5): value for key, value in tensors.items() if key.startswith(T5)}
    write_tensors(checkpoint / WEIGHTS, {key: value for key, value in tensors.items() if not key.startswith(T5)})
    write_tensors(t5 / WEIGHTS, of_t5 | {"decoder.final_layer_norm.weight": of_t5["encoder.final_layer_norm.weight"]})
    config = json.loads((small_folder / "config.json").read_text())
    prompt = config["model"]["conditioning"]["configs"][0]["config"]
    (t5 / "config.json").write_text(json.dumps(T5_CONFIG | prompt.pop("t5_config")))
    (checkpoint / "model_config.json").write_text(json.dumps(config))
    shutil.copyfile(small_folder / "spiece.model", t5 / "spiece.model")
    return checkpoint, t5


@pytest.fixture
def hub(small_folder: Path, checkpoint_and_t5: tuple[Path, Path]) -> Hub:
    checkpoint, t5 = map(contents, checkpoint_and_t5)
    legal = {"LICENSE.md": b"the licence", "NOTICE": b"the notice"}
    useless = {"README.md": b"card", "model.ckpt": b"pickle", "vae/model.safetensors": b"another layout"}
    return Hub(
        {
            "studio/whole": Repository(contents(small_folder) | legal | useless),
            "studio/checkpoint": Repository(checkpoint | legal | useless),
            "google-t5/t5-base": Repository(t5 | {"pytorch_model.bin": b"pickle", "tokenizer.json": b"{}"}),
            "stabilityai/stable-audio-open-small": Repository(contents(small_folder) | legal, gated=True),
            "studio/pickled": Repository({"model.ckpt": b"pickle", "model_config.json": b"{}"}),
        }
    )


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def run(tmp_path: Path, home: Path) -> Run:
    """Runs Python in an empty folder, with an empty cache at first; further arguments are environment variables."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}

    def run(*arguments: str, endpoint: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        env = {**ours, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=tmp_path)

    return run


@pytest.fixture
def generate(run: Run) -> Run:
    """Makes a.wav with the command line."""

    def generate(model: str, endpoint: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        request = ["kick drum", "--seconds", "0.5", "--steps", "1", "--seed", "3", "--output", "a.wav", "--overwrite"]
        command = ["-m", "mlx_audio_native", "generate", *request, "--model", model]
        return run(*command, endpoint=endpoint, **environment)

    return generate


def refused(result: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """One plain line that holds the words, and status 1."""
    assert result.returncode == 1, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "unexpected" not in line
    for word in words:
        assert word in line


def snapshot(home: Path, id_: str, hub: Hub) -> Path:
    return home / "hub" / f"models--{id_.replace('/', '--')}" / "snapshots" / hub.repositories[id_].commit


def test_a_checkpoint_and_the_t5_it_names_are_fetched_once(hub, generate, home, tmp_path, checkpoint_and_t5):
    id_, t5 = "studio/checkpoint", "google-t5/t5-base"
    with serving(hub) as endpoint:
        result = generate(id_, endpoint)
        assert result.returncode == 0, result.stderr
        small = {f"/{id_}/resolve/main/LICENSE.md"}
        small |= {f"/{id_}/resolve/{hub.repositories[id_].commit}/{file}" for file in ("NOTICE", "model_config.json")}
        small |= {f"/{t5}/resolve/main/config.json", f"/{t5}/resolve/{hub.repositories[t5].commit}/spiece.model"}
        weights = {hashlib.sha256(hub.repositories[x].files[WEIGHTS]).hexdigest() for x in (id_, t5)}
        assert hub.fetched() == small | {f"/cdn/{digest}" for digest in weights}
        first = (tmp_path / "a.wav").read_bytes()

        # from then on nothing is asked, and it works without a hub, with and without being told so
        number = len(hub.asked)
        assert generate(id_, endpoint).returncode == 0 and len(hub.asked) == number
        assert generate(id_, endpoint, HF_HUB_OFFLINE="1").returncode == 0 and len(hub.asked) == number
    assert generate(id_, endpoint).returncode == 0
    assert (tmp_path / "a.wav").read_bytes() == first

    folder = snapshot(home, id_, hub)
    assert (folder / "LICENSE.md").read_bytes() == b"the licence" and (folder / "NOTICE").is_file()
    assert read_recipe(tmp_path / "a.wav").model == f"{id_}@{hub.repositories[id_].commit}"
    # the same as a release's folder with T5 beside it
    release = tmp_path / "release"
    shutil.copytree(checkpoint_and_t5[0], release)
    shutil.copytree(checkpoint_and_t5[1], release / "text_encoder")
    load(release).generate("kick drum", seconds=0.5, steps=1, seed=3).save(tmp_path / "b.wav")
    assert np.array_equal(*(soundfile.read(tmp_path / file)[0] for file in ("a.wav", "b.wav")))


def test_converting_from_an_id_leaves_all_of_it_here(hub, run, tmp_path, small_folder):
    with serving(hub) as endpoint:
        command = ["-m", "mlx_audio_native", "convert", "studio/checkpoint", "--output", "here"]
        assert run(*command, endpoint=endpoint).returncode == 0
    here = tmp_path / "here"
    licences = {"LICENSE.md": b"the licence", "NOTICE": b"the notice"}
    assert licences.items() <= contents(here).items()
    options = {"seconds": 0.5, "steps": 1, "seed": 3}
    made, expected = (load(folder).generate("kick drum", **options) for folder in (here, small_folder))
    np.testing.assert_array_equal(made.samples, expected.samples)


def test_a_whole_model_folder_needs_no_other_repository(hub, generate):
    with serving(hub) as endpoint:
        result = generate("studio/whole", endpoint)
        assert result.returncode == 0, result.stderr
    assert not [path for _, path, _ in hub.asked if "t5-base" in path or "vae" in path or "ckpt" in path]


def test_a_revision_is_a_tag_or_a_commit(hub, generate, tmp_path):
    pinned = f"studio/whole@{hub.repositories['studio/whole'].commit}"
    with serving(hub) as endpoint:
        assert generate(pinned, endpoint).returncode == 0
        assert read_recipe(tmp_path / "a.wav").model == pinned
        weights = [path for path in hub.fetched() if path.startswith("/cdn/")]
        assert generate("studio/whole@v1", endpoint).returncode == 0
        assert [path for path in hub.fetched() if path.startswith("/cdn/")] == weights  # the blobs are shared
        refused(generate("studio/whole@v2", endpoint), "'v2'", f"{endpoint}/studio/whole/commits/main")


def test_a_gated_model_says_where_its_licence_is_and_how_to_log_in(hub, generate, home):
    id_ = "stabilityai/stable-audio-open-small"
    with serving(hub) as endpoint:
        for environment in ({}, {"HF_TOKEN": "hf_somebody"}):
            refused(generate(id_, endpoint, **environment), f"{endpoint}/{id_}", "`hf auth login`", "HF_TOKEN")
            assert not snapshot(home, id_, hub).exists()
        refused(generate(id_, endpoint, HF_TOKEN=EXPIRED), "401", "Invalid credentials", "`hf auth login`")
        result = generate(id_, endpoint, HF_TOKEN=TOKEN)
        assert result.returncode == 0, result.stderr


def test_an_unknown_model_is_named_with_the_nearest_known_one(hub, generate):
    with serving(hub) as endpoint:
        refused(generate("stabilityai/stable-audio-smal", endpoint), "no model", "stabilityai/stable-audio-open-small")
        refused(generate("studio/pickled", endpoint), "studio/pickled has no model.safetensors")


def test_a_cut_download_is_refused_and_goes_on_where_it_stopped(hub, generate, make_folder, home):
    def large(config: dict[str, Any]) -> None:
        config["model"]["conditioning"]["configs"][0]["config"]["t5_config"]["vocab_size"] = 200_000

    hub.repositories["studio/large"] = Repository(contents(make_folder(large)))
    weights = hub.repositories["studio/large"].files[WEIGHTS]
    folder = snapshot(home, "studio/large", hub)
    hub.hang_up_after = 15 << 20  # the client writes blocks of 10 MB
    with serving(hub) as endpoint:
        refused(generate("studio/large", endpoint), "cannot fetch studio/large", "run it again")
        assert not (folder / WEIGHTS).exists() and not (folder.parents[2] / "a.wav").exists()
        refused(generate("studio/large", endpoint, HF_HUB_OFFLINE="1"), "not whole in the hub's cache")
        (partial,) = (folder.parents[1] / "blobs").glob("*.incomplete")
        there = partial.stat().st_size
        assert 0 < there < len(weights)

        hub.hang_up_after = None
        hub.asked.clear()
        result = generate("studio/large", endpoint)
        assert result.returncode == 0, result.stderr
    ranges = [range_ for method, path, range_ in hub.asked if method == "GET" and path.startswith("/cdn/")]
    assert ranges == [f"bytes={there}-"]
    assert (folder / WEIGHTS).read_bytes() == weights
    assert not list((folder.parents[1] / "blobs").glob("*.incomplete"))


def test_what_another_program_left_incomplete_in_the_cache_is_completed(hub, run):
    fetch = "import huggingface_hub as h; h.hf_hub_download('google-t5/t5-base', 'model.safetensors')"
    resolve = "from mlx_audio_native.hub import resolve; print(*resolve('google-t5/t5-base').glob('*'))"
    with serving(hub) as endpoint:
        assert run("-c", fetch, endpoint=endpoint).returncode == 0
        assert run("-c", resolve, endpoint=endpoint, HF_HUB_OFFLINE="1").returncode == 1
        assert run("-c", resolve, endpoint=endpoint).stdout.count("spiece.model") == 1
    assert len([path for _, path, _ in hub.asked if path.startswith("/cdn/")]) == 1


def test_offline_with_nothing_in_the_cache(hub, generate):
    with serving(hub) as endpoint:
        refused(generate("studio/whole", endpoint, HF_HUB_OFFLINE="1"), "studio/whole", "HF_HUB_OFFLINE")
    assert not hub.asked


def test_no_connection(hub, generate):
    with serving(hub) as endpoint:
        pass
    refused(generate("studio/whole", endpoint), "cannot fetch studio/whole", "a folder that is here")


def test_without_the_extra_it_is_named(run):
    code = "import sys; sys.modules['huggingface_hub'] = None; import mlx_audio_native.cli as cli; cli.run()"
    result = run("-c", code, "generate", "kick", "--model", "studio/whole", endpoint="http://127.0.0.1:9")
    refused(result, "no folder studio/whole", "pip install '.[hub]'")


def test_a_folder_of_that_name_comes_first_and_without_the_client(hub, run, tmp_path, small_folder):
    shutil.copytree(small_folder, tmp_path / "studio" / "whole")
    code = "import sys, mlx_audio_native as m; m.load('studio/whole'); assert 'huggingface_hub' not in sys.modules"
    with serving(hub) as endpoint:
        result = run("-c", code, endpoint=endpoint)
    assert result.returncode == 0, result.stderr
    assert not hub.asked


@pytest.mark.parametrize(
    "source", ["nothing", "a/b/c", "./a/b", "/a/b", "../b", "a/..", "a/b--c", "a/", "/b", "a b/c", "a/b@", "", "~/a"]
)
def test_what_does_not_read_as_an_id_is_a_path(source):
    assert resolve(source) == Path(source)


def test_a_path_is_never_an_id():
    assert resolve(Path("stabilityai/stable-audio-open-small")) == Path("stabilityai/stable-audio-open-small")


def test_names(small_folder, tmp_path):
    assert name(small_folder) == "small"
    assert name(tmp_path / "models--a--b.c-1" / "snapshots" / "0f") == "a/b.c-1@0f"
    assert name(tmp_path / "snapshots" / "0f") == "0f"
    assert name(Path("/")) == ""
