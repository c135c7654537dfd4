"""A page for the browser and an HTTP API, by Gradio: one clip at a time, nothing fetched from elsewhere."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from .audio import Recipe, file_stem, read_recipe
from .errors import InputError, MlxAudioError
from .plot import plot_file

if TYPE_CHECKING:
    import gradio

# of one request; MAX_BODY in bytes
MAX_COUNT, MAX_SECONDS, MAX_STEPS = 8, 60, 200
MAX_BODY = 32 << 20
MAX_WAITING = 16  # requests behind the one that is served
KEPT_BYTES, KEPT_SECONDS = 1 << 30, 3600  # of clips, pictures and uploads
KEPT_SESSIONS = 200
SHOWN = 20  # clips in a session's history
_LONGEST_ERROR = 300  # characters; a sentence may quote a prompt of any length
# A browser obeys it: no script, font or picture from elsewhere, whatever Gradio asks for.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


class Maker:
    """Makes clips as files. One thread loads the model and runs it: MLX's streams belong to a thread."""

    def __init__(self, model: str | None, folder: Path, compile: bool = False) -> None:
        from .blas import require_backend

        require_backend()
        from .model import load

        self.folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1)
        # one too: every thread that draws keeps the memory it took
        self._drawing = ThreadPoolExecutor(max_workers=1)
        self._model = self._thread.submit(load, model).result()
        if compile:
            self._thread.submit(self._model.compile).result()

    def make(self, count: int | None, options: dict[str, Any]) -> Iterator[Path]:
        """WAV files of `count` clips as they are done, seeds one up. Raises MlxAudioError, UserWarning or OSError."""
        first = self._thread.submit(self._check, count, options).result()
        for seed in range(first, first + (count or 1)):
            yield self._thread.submit(self._clip, options | {"seed": seed}).result()

    def picture(self, path: Path) -> Path:
        """The PNG beside a clip, drawn when first asked for."""
        picture = path.with_suffix(".png")
        if not picture.exists():
            self._drawing.submit(plot_file, path, picture, overwrite=True).result()
        return picture

    def close(self) -> None:
        """Ends when the clip that is being made is done."""
        self._thread.shutdown(cancel_futures=True)
        self._drawing.shutdown(cancel_futures=True)

    def _check(self, count: int | None, options: dict[str, Any]) -> int:
        """The first seed of a request that can be honoured."""
        count = 1 if count is None else count
        if not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
            raise InputError(f"count must be a whole number from 1 to {MAX_COUNT} here, not {count!r:.60}")
        with warnings.catch_warnings():
            # the command line says so and goes on; here nobody would read it
            warnings.filterwarnings("error", "the prompt is longer than", UserWarning)
            recipe = self._model.recipe(**options)
            self._model.recipe(**options | {"seed": recipe.seed + count - 1})
        for name, found, most in (("seconds", recipe.seconds, MAX_SECONDS), ("steps", recipe.steps, MAX_STEPS)):
            if found > most:
                raise InputError(f"{name} must be at most {most} here, not {found:g}")
        return recipe.seed

    def _clip(self, options: dict[str, Any]) -> Path:
        audio = self._model.generate(**options)
        path = self.folder / f"{file_stem(audio.recipe.prompt)}-{secrets.token_hex(4)}.wav"
        audio.save(path)
        self.tidy()
        return path

    def tidy(self) -> None:
        """Delete files that are older than KEPT_SECONDS, and all but the newest KEPT_BYTES."""
        files = [(path, path.stat()) for path in self.folder.rglob("*") if path.is_file()]
        files.sort(key=lambda file: file[1].st_mtime_ns, reverse=True)
        total = 0
        for path, stat in files:
            total += stat.st_size
            if total > KEPT_BYTES or time.time() - stat.st_mtime > KEPT_SECONDS:
                path.unlink(missing_ok=True)
                path.with_suffix(".png").unlink(missing_ok=True)


def serve(model: str | None = None, host: str = "127.0.0.1", port: int = 7860, compile: bool = False) -> None:
    """Serve the page until interrupted; port 0 takes any that is free. Prints its address.

    Raises InputError without Gradio or where nothing can listen, or MlxAudioError for the model.
    """
    with _listen(host, port) as listener, tempfile.TemporaryDirectory() as folder:
        # before the import: no asking for a newer version, no counting of users
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        os.environ |= {"GRADIO_RUN_HISTORY": "False", "GRADIO_TEMP_DIR": folder}
        try:
            import gradio
            import uvicorn
            from fastapi import FastAPI
        except ImportError as error:
            raise InputError("the page takes an extra: pip install '.[ui]' in the clone") from error
        maker = Maker(model, Path(folder).resolve(), compile)
        try:
            app = gradio.mount_gradio_app(
                FastAPI(openapi_url=None),
                _page(maker),
                "/",
                footer_links=["api", "settings"],
                max_file_size=MAX_BODY,
                show_error=False,
                ssr_mode=False,
                pwa=False,
            )
            name = f"[{host}]" if ":" in host else host
            print(f"http://{name}:{listener.getsockname()[1]}/: the page; Ctrl-C ends it", flush=True)
            # a name of somebody's own that leads here is not ours: else any page in the browser could ask in its place
            local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
            guarded = _Guard(app, maker, {host, "localhost", "127.0.0.1", "::1"} if local else None)
            # an open page holds a connection, so waiting for all to close has to end
            config = uvicorn.Config(guarded, log_level="critical", timeout_graceful_shutdown=1)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            maker.close()


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be from 0 to 65535, not {port}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        # create_server adds the address to what the system says
        problem = str(getattr(error, "strerror", None) or error).partition(" (while attempting")[0]
        raise InputError(f"cannot serve at {host}:{port}: {problem}") from None


class _Guard:
    """An ASGI application around another: refuses what that would not, and keeps browsers from looking elsewhere."""

    def __init__(self, app: Any, maker: Maker, names: set[str] | None) -> None:
        """`names` are what requests may call this host; None allows any."""
        self.app, self.maker, self.names = app, maker, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from fastapi.responses import JSONResponse

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY)]
            await send(message)

        if refusal := scope["type"] == "http" and self._refuse(scope["path"], dict(scope["headers"])):
            status, problem = refusal
            await JSONResponse({"detail": problem}, status)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"].endswith("/upload"):
            self.maker.tidy()
        await self.app(scope, receive, send_with_policy)

    def _refuse(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and sentence, if the request is refused."""
        # chunks would tell their sum too late
        if b"transfer-encoding" in headers or int(headers.get(b"content-length", 0)) > MAX_BODY:
            return 413, f"a request must hold at most {MAX_BODY >> 20} MB, and tell its length"
        if "://" in path:
            return 403, "nothing is fetched from elsewhere"  # Gradio would: file=http://…
        name = urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname
        if self.names is not None and name not in self.names:
            return 403, "this page answers to its own machine alone, see --host"
        return None


def _page(maker: Maker) -> gradio.Blocks:
    import gradio as gr

    def generate(
        prompt: str,
        seconds: float | None = None,
        seed: int | None = None,
        steps: int | None = None,
        count: int | None = 1,
        init_audio: str | None = None,
        noise_level: float | None = None,
        trim: bool = False,
        bars: int | None = None,
        bpm: float | None = None,
        history: list[Path] | None = None,
    ) -> Iterator[tuple[list[str], list[Path]]]:
        """Make clips: 24-bit WAV files, each with the recipe inside, given out as they are done."""
        options = {"prompt": prompt, "seconds": seconds, "seed": seed, "steps": steps, "bars": bars, "bpm": bpm}
        options |= {"init_audio": init_audio, "noise_level": noise_level, "trim": bool(trim)}
        made: list[Path] = []
        try:
            for path in maker.make(count, options):
                made.append(path)
                yield [str(path) for path in made], [*(history or []), *made][-SHOWN:]
        except (MlxAudioError, UserWarning, OSError) as error:
            sentence = str(error)
            if init_audio is not None:  # where an upload lies is nobody's business
                sentence = sentence.replace(f"{Path(init_audio).parent}{os.sep}", "")
            raise gr.Error(textwrap.shorten(sentence, _LONGEST_ERROR), print_exception=False) from None

    async def uploaded(path: str) -> str:
        if "\0" in path or not Path(path).resolve().is_relative_to(maker.folder):
            raise gr.Error("a file must be uploaded: no other, and no address, is read", print_exception=False)
        return path

    with gr.Blocks(title="mlx-audio-native", analytics_enabled=False) as page:
        page.state_session_capacity = KEPT_SESSIONS
        history = gr.State([])
        gr.Markdown("# mlx-audio-native")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(label="Prompt", placeholder="kick drum loop, 120 BPM", autofocus=True)
                with gr.Row():
                    seconds = gr.Number(label="Seconds", value=None, placeholder="4", min_width=90)
                    steps = gr.Number(label="Steps", value=None, placeholder="the model's", min_width=90)
                    count = gr.Number(label="Count", value=1, min_width=90)
                with gr.Row():
                    seed = gr.Number(label="Seed", value=None, placeholder="drawn", min_width=160)
                    lock = gr.Checkbox(label="Lock the seed", min_width=120)
                with gr.Accordion("Loop", open=False), gr.Row():
                    bars = gr.Number(label="Bars, in place of seconds", value=None, min_width=90)
                    bpm = gr.Number(label="BPM", value=None, placeholder="the prompt's", min_width=90)
                with gr.Accordion("Init audio", open=False):
                    init_audio = gr.Audio(label="Sound to start from", type="filepath", sources=["upload"])
                    with gr.Row():
                        noise_level = gr.Number(label="Noise level", value=None, placeholder="0.7", min_width=90)
                        trim = gr.Checkbox(label="Trim to the model's window", min_width=120)
                with gr.Row():
                    go = gr.Button("Generate", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3):
                files = gr.File(label="Clips", file_count="multiple", visible=False)

                @gr.render(inputs=history, queue=False)
                def show(paths: list[Path]) -> None:
                    for path in filter(Path.exists, reversed(paths)):
                        recipe = read_recipe(path)
                        with gr.Group(key=f"group {path}"):
                            gr.HTML(_card(recipe, path, maker.picture(path)), key=f"card {path}")
                            again = gr.Button("Use its settings", size="sm", key=f"again {path}")
                        again.click(partial(_settings, recipe), None, settings, queue=False, api_visibility="private")

        settings = [prompt, seconds, seed, steps, bars, bpm, noise_level, lock]
        inputs = [prompt, seconds, seed, steps, count, init_audio, noise_level, trim, bars, bpm, history]
        for field in (*inputs[:-1], lock):
            # a mounted Gradio copies any file that a request names for any field, and fetches addresses
            field.async_move_resource_to_block_cache = uploaded
        seed.input(lambda: True, None, lock, queue=False, api_visibility="private")
        drawn = gr.on([go.click, prompt.submit], _next_seed, [seed, lock], seed, queue=False, api_visibility="private")
        run = drawn.then(generate, inputs, [files, history], api_name="generate", show_progress_on=[go])
        stop.click(None, cancels=run)
        # a number that starts as None shows as 0
        empty = [seconds, steps, seed, bars, bpm, noise_level]
        page.load(lambda: [None] * len(empty), None, empty, queue=False, api_visibility="private")
    # closed to calls that pass the queue by
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


def _next_seed(seed: int | None, locked: bool) -> int:
    return seed if locked and seed is not None else secrets.randbelow(2**32)


def _settings(recipe: Recipe) -> tuple[Any, ...]:
    """What made a clip, for the fields of the page, the seed locked."""
    options = recipe.options()
    names = "prompt", "seconds", "seed", "steps", "bars", "bpm", "noise_level"
    return *(options.get(name) for name in names), True


def _card(recipe: Recipe, path: Path, picture: Path) -> str:
    """A clip in HTML: player, spectrogram, download. Gradio's own player would convert some files where ffmpeg is."""
    wav, png = (f"gradio_api/file={quote(str(file))}" for file in (path, picture))
    return (
        f"<p><b>{escape(recipe.prompt)}</b> · {recipe.seconds:g} s · seed {recipe.seed}</p>"
        f'<audio controls {"loop" if recipe.bars else ""} src="{wav}" style="width: 100%"></audio>'
        f'<img src="{png}" alt="waveform and spectrogram" style="width: 100%">'
        f'<a href="{wav}" download="{escape(path.name)}">Download {escape(path.name)}</a>'
    )
