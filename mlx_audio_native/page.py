"""A page for the browser and an HTTP API, by Gradio: one clip at a time, nothing fetched from elsewhere."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import textwrap
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .audio import file_stem, read_recipe
from .errors import InputError, MlxAudioError
from .plot import plot_file

if TYPE_CHECKING:
    import gradio

# of one request; MAX_BODY in bytes
MAX_COUNT, MAX_SECONDS, MAX_STEPS = 8, 60, 200
MAX_BODY = 32 << 20
MAX_WAITING = 16  # requests behind the one that is served
KEPT_BYTES = 1 << 30  # of clips
KEPT_SECONDS = 3600  # clips and uploads
KEPT_SESSIONS = 200
SHOWN = 20  # clips in a session's history
_LONGEST_ERROR = 300  # characters; a sentence may quote a prompt of any length
# A browser obeys it: no script, font or picture from elsewhere, whatever Gradio asks for.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


class Maker:
    """Makes clips as files. One thread loads the model and runs it: MLX's streams belong to a thread."""

    def __init__(self, model: str | None, folder: Path) -> None:
        from .blas import require_backend

        require_backend()
        from .model import load

        self.folder = folder
        self._kept: deque[tuple[Path, int]] = deque()
        self._bytes = 0
        self._thread = ThreadPoolExecutor(max_workers=1)
        # one too: every thread that draws keeps the memory it took
        self._drawing = ThreadPoolExecutor(max_workers=1)
        self._model = self._thread.submit(load, model).result()

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
        if count not in (None, *range(1, MAX_COUNT + 1)):
            raise InputError(f"count must be from 1 to {MAX_COUNT} here, not {count!r:.60}")
        with warnings.catch_warnings():
            # the command line says so and goes on; here nobody would read it
            warnings.filterwarnings("error", "the prompt is longer than", UserWarning)
            recipe = self._model.recipe(**options)
        for name, found, most in (("seconds", recipe.seconds, MAX_SECONDS), ("steps", recipe.steps, MAX_STEPS)):
            if found > most:
                raise InputError(f"{name} must be at most {most} here, not {found:g}")
        return recipe.seed

    def _clip(self, options: dict[str, Any]) -> Path:
        audio = self._model.generate(**options)
        path = self.folder / f"{file_stem(audio.recipe.prompt)}-{secrets.token_hex(4)}.wav"
        audio.save(path)
        self._kept.append((path, path.stat().st_size))
        self._bytes += self._kept[-1][1]
        while self._bytes > KEPT_BYTES:
            oldest, size = self._kept.popleft()
            oldest.unlink(missing_ok=True)
            oldest.with_suffix(".png").unlink(missing_ok=True)
            self._bytes -= size
        return path


def serve(model: str | None = None, host: str = "127.0.0.1", port: int = 7860) -> None:
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
        maker = Maker(model, Path(folder).resolve())
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
            # an open page holds a connection, so waiting for all to close has to end
            config = uvicorn.Config(_Guard(app), log_level="critical", timeout_graceful_shutdown=1)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            maker.close()


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be from 0 to 65535, not {port}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot serve at {host}:{port}: {getattr(error, 'strerror', None) or error}") from None


class _Guard:
    """An ASGI application around another: refuses large bodies unread, and keeps browsers from looking elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from fastapi.responses import JSONResponse

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY)]
            await send(message)

        headers = dict(scope.get("headers", ()))
        # chunks would tell their sum too late
        if b"transfer-encoding" in headers or int(headers.get(b"content-length", 0)) > MAX_BODY:
            problem = f"a request must hold at most {MAX_BODY >> 20} MB, and tell its length"
            await JSONResponse({"detail": problem}, 413)(scope, receive, send)
        else:
            await self.app(scope, receive, send_with_policy)


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
            # where an upload lies is nobody's business
            sentence = str(error).replace(f"{Path(init_audio or '.').parent}{os.sep}", "")
            raise gr.Error(textwrap.shorten(sentence, _LONGEST_ERROR), print_exception=False) from None

    async def uploaded(path: str) -> str:
        if not Path(path).resolve().is_relative_to(maker.folder):
            raise gr.Error("init audio must be uploaded: no other file or address is read", print_exception=False)
        return path

    with gr.Blocks(title="mlx-audio-native", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
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
                    # a mounted Gradio reads any file that a request names, and fetches addresses
                    init_audio.async_move_resource_to_block_cache = uploaded
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
                        with gr.Group(key=f"group {path}"):
                            gr.HTML(_card(path, maker.picture(path)), key=f"card {path}")
                            again = gr.Button("Use its settings", size="sm", key=f"again {path}")
                        again.click(partial(_settings, path), None, settings, queue=False, api_visibility="private")

        settings = [prompt, seconds, seed, steps, bars, bpm, noise_level, lock]
        inputs = [prompt, seconds, seed, steps, count, init_audio, noise_level, trim, bars, bpm, history]
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


def _settings(path: Path) -> tuple[Any, ...]:
    """What made a clip, for the fields of the page, the seed locked."""
    options = read_recipe(path).options()
    names = "prompt", "seconds", "seed", "steps", "bars", "bpm", "noise_level"
    return *(options.get(name) for name in names), True


def _card(path: Path, picture: Path) -> str:
    """A clip in HTML: player, spectrogram, download. Gradio's own player would convert some files where ffmpeg is."""
    recipe = read_recipe(path)
    wav, png = (f"gradio_api/file={quote(str(file))}" for file in (path, picture))
    return (
        f"<p><b>{escape(recipe.prompt)}</b> · {recipe.seconds:g} s · seed {recipe.seed}</p>"
        f'<audio controls {"loop" if recipe.bars else ""} src="{wav}" style="width: 100%"></audio>'
        f'<img src="{png}" alt="waveform and spectrogram" style="width: 100%">'
        f'<a href="{wav}" download="{escape(path.name)}">Download {escape(path.name)}</a>'
    )
