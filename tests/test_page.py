"""The page, as a browser and as programs use it: a server of its own, the embedded model, a real Chromium."""

import builtins
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile

from mlx_audio_native import generate, read_recipe
from mlx_audio_native.cli import main
from mlx_audio_native.page import KEPT_SECONDS, MAX_BODY, MAX_WAITING, SHOWN, Maker

pytest.importorskip("gradio", reason="the page takes the extra `ui`")

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
(SERVE,) = re.findall(r"^mlx-audio-native (serve.*)", README, re.MULTILINE)
(CURL,) = re.findall(r"^PAGE=.*curl .*", README, re.MULTILINE)
LONG = "kick drum " * 100
# The command line, telling of every look elsewhere that the process takes.
COMMAND = """
import sys
def audit(event, args):
    names = {"socket.connect": args[1:2], "socket.sendto": args[1:2], "socket.getaddrinfo": args[:1]}.get(event, ())
    for name in names:
        host = name[0] if isinstance(name, tuple) else name
        if host not in ("127.0.0.1", "localhost", None):
            print("looked elsewhere:", event, host, file=sys.stderr, flush=True)
sys.addaudithook(audit)
from mlx_audio_native.cli import run
run()
"""


class Server:
    """The README's command, at a free port."""

    def __init__(self, folder, *options):
        self.log = folder / "stderr"
        command = [sys.executable, "-c", COMMAND, *shlex.split(SERVE), "--port", "0", *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), self.log.read_text()
        self.url = line.split(": ")[0]

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(30)
        self.process.stdout.close()
        return status

    def post(self, **options):
        """The id of a request that waits now; HTTPError 503 if too many do."""
        call = urllib.request.Request(f"{self.url}gradio_api/call/v2/generate", json.dumps(options).encode())
        call.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(call, timeout=300) as answer:
            return json.load(answer)["event_id"]

    def stream(self, event):
        """What comes of it: (kind, data) as it comes."""
        with urllib.request.urlopen(f"{self.url}gradio_api/call/generate/{event}", timeout=300) as answer:
            kind = ""
            for line in map(bytes.decode, answer):
                if line.startswith("event: "):
                    kind = line[7:].strip()
                elif line.startswith("data: "):
                    yield kind, json.loads(line[6:])

    def wait(self, event):
        """The WAVs as bytes, or the sentence that refuses them."""
        *_, (kind, data) = self.stream(event)
        if kind == "error":
            return data["error"]
        return [self.read(file["url"]) for file in data[0]]

    def ask(self, **options):
        return self.wait(self.post(**options))

    def read(self, url):
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()

    def upload(self, path):
        command = ["curl", "-s", "-F", f"files=@{path}", f"{self.url}gradio_api/upload"]
        answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return {"path": answer[0], "meta": {"_type": "gradio.FileData"}} if isinstance(answer, list) else answer

    def memory(self):
        """Resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def browser(tmp_path):
    """Chromium, in a window of its own, that downloads into tmp_path."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="driving a browser takes selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1100"):
        options.add_argument(switch)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Page:
    """What a person does with the page."""

    def __init__(self, browser, server):
        self.browser, self.url = browser, server.url
        self.open()

    def open(self):
        self.browser.get(self.url)
        until(lambda: self.find("//label") and self.field("Seconds").get_attribute("value") == "")

    def find(self, xpath):
        return self.browser.find_elements("xpath", xpath)

    def field(self, label):
        return self.find(f"//label[span[starts-with(., '{label}')]]//*[self::input or self::textarea]")[0]

    def all(self, selector, name):
        """A property of all such elements, at once, since the page may redraw them at any time."""
        script = "return Array.from(document.querySelectorAll(arguments[0]), element => element[arguments[1]])"
        return self.browser.execute_script(script, selector, name)

    def button(self, text):
        return self.find(f"//button[starts-with(normalize-space(.), '{text}')]")[0]

    def fill(self, label, value):
        from selenium.webdriver import Keys

        field = self.field(label)
        field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, str(value))

    def clips(self):
        """Links to the clips of the history, newest first."""
        return self.all("a[download]", "href")

    def generate(self, **fields):
        """Links to the clips that the fields make."""
        for label, value in fields.items():
            self.fill(label, value)
        before = set(self.clips())
        wanted = len(before) + int(self.field("Count").get_attribute("value"))
        self.button("Generate").click()
        until(lambda: len(self.clips()) == wanted)
        return [link for link in self.clips() if link not in before]

    def toasts(self):
        return self.all("[data-testid=toast-text]", "textContent")


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def saved(path, prompt, **options):
    """The file that `Model.generate` makes."""
    generate(prompt, **options).save(path, overwrite=True)
    return path.read_bytes()


def told(capsys, *command):
    """The sentence that the command line tells of it."""
    main(list(command))
    return capsys.readouterr().err.strip().split(": ", 1)[1]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sine.wav"
    soundfile.write(path, 0.5 * np.sin(np.arange(44100) / 20), 44100)
    return path


def test_the_readme_s_line_of_curl(server, tmp_path):
    subprocess.run(
        ["bash", "-euc", CURL.replace("http://127.0.0.1:7860", server.url.rstrip("/"))], cwd=tmp_path, check=True
    )
    (path,) = tmp_path.glob("*.wav")
    recipe = read_recipe(path)
    assert path.read_bytes() == saved(tmp_path / "same.wav", **recipe.options())
    assert recipe.prompt in CURL and str(recipe.seed) in CURL


def test_clips_are_those_that_generate_makes(server, sound, tmp_path):
    first, second = server.ask(prompt="saw bass, D2", seconds=0.5, steps=2, seed=2**63, count=2)
    assert first == saved(tmp_path / "a.wav", "saw bass, D2", seconds=0.5, steps=2, seed=2**63)
    assert second == saved(tmp_path / "a.wav", "saw bass, D2", seconds=0.5, steps=2, seed=2**63 + 1)
    (loop,) = server.ask(prompt="hi-hat loop", bars=1, bpm=240, seed=1)
    assert loop == saved(tmp_path / "a.wav", "hi-hat loop", bars=1, bpm=240, seed=1)
    (made,) = server.ask(prompt="snare drum loop", seed=3, init_audio=server.upload(sound), noise_level=0.5)
    assert made == saved(tmp_path / "a.wav", "snare drum loop", seed=3, init_audio=sound, noise_level=0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a", "seconds": "long"}, "seconds must be a number, not 'long'"),
        ({"prompt": "a", "seconds": 61}, "seconds must be at most 60 here, not 61"),
        ({"prompt": "a", "bars": 100, "bpm": 60}, "seconds must be at most 60 here, not 400"),
        ({"prompt": "a", "steps": 1.5}, "steps must be a whole number, not 1.5"),
        ({"prompt": "a", "steps": 201}, "steps must be at most 200 here, not 201"),
        ({"prompt": "a", "count": 9}, "count must be a whole number from 1 to 8 here, not 9"),
        ({"prompt": "a", "count": 2.0}, "count must be a whole number from 1 to 8 here, not 2.0"),
        ({"prompt": "a", "seed": 2**64 - 1, "count": 2}, f"seed must be from 0 to {2**64 - 1}, not {2**64}"),
        ({"prompt": "a", "seed": -1}, "seed must be from 0 to 18446744073709551615, not -1"),
        ({"prompt": "a", "bpm": 120}, "bpm is about a loop: give bars too"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(server, options, sentence):
    assert server.ask(**options) == sentence


def test_the_same_sentences_as_the_command_line(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = tmp_path / "long.wav"
    soundfile.write(long, np.zeros((44100 * 10, 2)), 44100)
    (tmp_path / "text.wav").write_text("no sound")
    for name in ("long.wav", "text.wav"):
        refusal = server.ask(prompt="a", init_audio=server.upload(tmp_path / name))
        assert refusal == told(capsys, "generate", "a", "--init-audio", name, "--output", "a.wav")
    assert server.ask(prompt=LONG).startswith("the prompt is longer than 64 tokens, so this is not heard: ")
    warned = told(capsys, "generate", LONG, "--seconds", "0.1", "--steps", "1", "--output", "a.wav")
    assert server.ask(prompt=LONG)[:200] == warned[:200]
    assert len(server.ask(prompt="kick " * 100_000)) <= 300


@pytest.mark.parametrize("field", ["prompt", "seconds", "seed", "steps", "count", "init_audio", "trim", "bars", "bpm"])
def test_only_uploads_are_read(server, field):
    for path in ("/etc/passwd", str(Path(__file__)), "http://127.0.0.1:1/a.wav", "a\0b"):
        refused = server.ask(**{"prompt": "a", field: {"path": path, "meta": {"_type": "gradio.FileData"}}})
        assert refused == "a file must be uploaded: no other, and no address, is read"


def test_no_file_or_address_is_handed_on(server):
    for path in ("/etc/passwd", str(Path(__file__)), "http://127.0.0.1:1/a.wav", "https%3A//127.0.0.1:1/a.wav"):
        for name in ("file=", "file/", "proxy="):
            with pytest.raises(urllib.error.HTTPError, match="40"):
                server.read(f"{server.url}gradio_api/{name}{path}")


def test_only_its_own_names_are_answered(server):
    for name, status in (("localhost", 200), ("127.0.0.1:9", 200), ("elsewhere.test", 403), ("", 403)):
        found = subprocess.run(
            ["curl", "-sH", f"Host: {name}", "-o", "/dev/null", "-w", "%{http_code}", server.url], capture_output=True
        )
        assert found.stdout == str(status).encode(), name


def test_huge_requests_are_refused_unread(server, tmp_path):
    huge = tmp_path / "huge.wav"
    with huge.open("wb") as file:
        file.truncate(MAX_BODY + 1)
    sentence = "a request must hold at most 32 MB, and tell its length"
    assert server.upload(huge) == {"detail": sentence}
    address = f"{server.url}gradio_api/call/v2/generate"
    answer = subprocess.run(["curl", "-s", "--data-binary", f"@{huge}", address], capture_output=True, check=True)
    assert json.loads(answer.stdout) == {"detail": sentence}


def test_there_is_no_way_past_the_queue(server):
    for name in ("run", "api"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            call = urllib.request.Request(f"{server.url}gradio_api/{name}/generate", b'{"data": ["a"]}')
            call.add_header("Content-Type", "application/json")
            urllib.request.urlopen(call, timeout=30)


def test_a_full_queue_refuses(server):
    accepted, refused = [], []
    for _ in range(MAX_WAITING + 8):
        try:
            accepted.append(server.post(prompt="kick drum loop", seconds=0.1, steps=1, seed=0, count=2))
        except urllib.error.HTTPError as error:
            refused.append((error.code, json.load(error)["detail"]))
    assert len(accepted) >= MAX_WAITING and refused
    assert all(code == 503 and text.startswith("Queue is full.") for code, text in refused)
    assert all(len(server.wait(event)) == 2 for event in accepted)


def test_who_leaves_does_not_keep_others_waiting(server):
    stream = server.stream(server.post(prompt="saw bass, D2", seconds=10, seed=0, count=8))
    data = next(data for kind, data in stream if kind == "generating")
    folder = Path(data[0][0]["path"]).parent
    stream.close()
    assert len(server.ask(prompt="kick drum loop", seconds=0.1, steps=1)) == 1
    assert len(list(folder.glob("saw-bass-d2-*.wav"))) < 8


def test_the_oldest_clips_go(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_audio_native.page.KEPT_BYTES", 100_000)
    maker = Maker(None, tmp_path)
    made = []
    for path in maker.make(3, {"prompt": "kick", "seconds": 0.15, "steps": 1}):
        path.with_suffix(".png").touch()
        made.append(path)
    maker.close()
    assert sorted(tmp_path.iterdir()) == sorted(file for path in made[1:] for file in (path, path.with_suffix(".png")))


def test_old_files_go_with_the_next_clip(tmp_path):
    maker = Maker(None, tmp_path)
    for name, age in (("upload/old.wav", KEPT_SECONDS + 60), ("new.wav", KEPT_SECONDS - 60)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    (made,) = maker.make(1, {"prompt": "kick", "seconds": 0.15, "steps": 1})
    maker.close()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([made, tmp_path / "new.wav"])


def test_a_person_at_the_page(server, browser, sound, tmp_path):
    prompt = "kick <b>drum</b> ${1+1} {{2}}"
    page = Page(browser, server)
    newest, oldest = page.generate(Prompt=prompt, Seconds=1, Count=2)
    seed = int(page.field("Seed").get_attribute("value"))
    assert server.read(oldest) == saved(tmp_path / "a.wav", prompt, seconds=1, seed=seed)
    assert server.read(newest) == saved(tmp_path / "a.wav", prompt, seconds=1, seed=seed + 1)
    assert page.all("p b", "textContent") == [prompt, prompt]
    until(lambda: page.all("img[alt*=spectrogram]", "naturalWidth") == [1000, 1000])
    until(lambda: page.all("audio[controls]", "duration") == [1, 1])

    page.find("//a[@download]")[0].click()
    until(lambda: list(tmp_path.glob("kick-*.wav")))
    (download,) = tmp_path.glob("kick-*.wav")
    assert read_recipe(download).seed == seed + 1

    page.find("//button[contains(., 'Use its settings')]")[1].click()
    until(lambda: page.field("Lock the seed").is_selected())
    (again,) = page.generate(Count=1)
    assert server.read(again) == server.read(oldest)
    page.field("Lock the seed").click()
    page.generate()
    assert int(page.field("Seed").get_attribute("value")) != seed

    # nothing was asked of elsewhere, neither by the browser nor, in all of these tests, by the server
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 10 and all(url.startswith((server.url, "data:", "blob:")) for url in asked)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert "looked elsewhere" not in server.log.read_text()
    with urllib.request.urlopen(server.url, timeout=30) as answer:
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")


def test_init_audio_and_loops_at_the_page(server, browser, sound, tmp_path):
    page = Page(browser, server)
    for name in ("Loop", "Init audio"):
        page.button(name).click()
    (loop,) = page.generate(Prompt="house beat", Bars=1, BPM=240, Seed=5)
    assert server.read(loop) == saved(tmp_path / "a.wav", "house beat", bars=1, bpm=240, seed=5)
    for name in ("Bars", "BPM"):
        page.fill(name, "")
    page.find("//input[@type='file']")[0].send_keys(str(sound))
    until(lambda: page.find("//button[@aria-label='Clear' or @title='Clear']"))
    (made,) = page.generate(Noise=0.4)
    assert server.read(made) == saved(tmp_path / "a.wav", "house beat", seed=5, init_audio=sound, noise_level=0.4)

    page.fill("Prompt", LONG)
    page.button("Generate").click()
    until(lambda: any(page.toasts()))
    assert page.toasts()[0].startswith("the prompt is longer than 64 tokens, so this is not heard: ")


def test_it_ends_under_an_open_connection_and_leaves_nothing(tmp_path):
    server = Server(tmp_path)
    event = server.post(prompt="kick", seconds=0.1, steps=1)
    stream = server.stream(event)
    folder = Path(next(data for kind, data in stream if kind == "generating")[0][0]["path"]).parent
    assert server.stop() == 130
    assert server.log.read_text() == "interrupted\n"
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_eight_clients_for_two_minutes(server, browser, tmp_path):
    """A person at the page, six programs that ask for one clip at a time, and one for 24 at once."""
    answers, refusals, memory, problems = [], Counter(), [], []
    end = time.monotonic() + 120
    page = Page(browser, server)

    def request(random):
        if random.random() < 0.1:
            return random.choice([{"prompt": LONG}, {"prompt": "a", "seconds": 61}, {"prompt": "a", "bpm": 1}])
        prompt = random.choice(["kick drum loop, 120 BPM", "saw bass, D2", "white noise sweep, rising"])
        return {"prompt": prompt, "seconds": random.choice([0.5, 1]), "seed": random.randrange(15)}

    def program(seed, at_once):
        random = Random(seed)
        while time.monotonic() < end:
            waiting = []
            for asked in [request(random) for _ in range(at_once)]:
                try:
                    waiting.append((asked, server.post(**asked)))
                except urllib.error.HTTPError as error:
                    refusals[json.load(error)["detail"][:13]] += 1
            for asked, event in waiting:
                answer = server.wait(event)
                if isinstance(answer, str):
                    refusals[answer[:25]] += 1
                else:
                    answers.append((asked, answer[0]))
            time.sleep(10 if at_once > 1 else random.random())

    def person():
        page.fill("Prompt", "saw bass, D2")
        while time.monotonic() < end:
            page.fill("Seconds", 1)
            before = page.clips()
            page.button("Generate").click()
            until(lambda before=before: page.clips() != before or any(page.toasts()))
            if page.clips() == before:
                refusals[page.toasts()[0][:13]] += 1
            else:
                asked = {"prompt": "saw bass, D2", "seconds": 1, "seed": int(page.field("Seed").get_attribute("value"))}
                answers.append((asked, server.read(page.clips()[0])))
            if len(page.clips()) == SHOWN or page.toasts():
                page.open()
                page.fill("Prompt", "saw bass, D2")

    def kept(client, *arguments):
        try:
            client(*arguments)
        except Exception as error:
            problems.append(error)

    clients = [threading.Thread(target=kept, args=(program, seed, 1)) for seed in range(6)]
    clients += [threading.Thread(target=kept, args=(program, 6, 24)), threading.Thread(target=kept, args=(person,))]
    for client in clients:
        client.start()
    while any(client.is_alive() for client in clients):
        memory.append(server.memory())
        time.sleep(1)
    middle = len(memory) // 2
    print(f"\n{len(answers)} clips, refused: {dict(refusals)}")
    print(f"MB after 15 s, at half time, at the end: {memory[15]:.0f}, {memory[middle]:.0f}, {memory[-1]:.0f}")
    assert not problems
    sentences = {"the prompt is longer than", "seconds must be at most 6", "bpm is about a loop: give", "Queue is full"}
    # the page's words for a full queue are "This application is currently busy. Please try again."
    assert len(answers) > 50 and sentences <= set(refusals) <= sentences | {"This applicat"}
    assert max(memory[middle:]) < 1.1 * max(memory[15:middle])
    known = {}
    for asked, answer in answers:
        key = tuple(asked.values())
        known[key] = known.get(key) or saved(tmp_path / "a.wav", **asked)
        assert answer == known[key], asked
    assert "looked elsewhere" not in server.log.read_text() and "Traceback" not in server.log.read_text()


def test_a_port_that_cannot_be_had(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 1
    assert capsys.readouterr().err == f"error: cannot serve at 127.0.0.1:{port}: Address already in use\n"
    for port in ("65536", "-1"):
        assert main(["serve", "--port", port]) == 1
        assert capsys.readouterr().err == f"error: --port must be from 0 to 65535, not {port}\n"
    assert main(["serve", "--host", "256.0.0.1", "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: cannot serve at 256.0.0.1:0: ")


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["serve", "--port", "0", "--model", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}")


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "gradio")
    find = builtins.__import__

    def without(name, *arguments):
        if name == "gradio":
            raise ImportError(name)
        return find(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["serve", "--port", "0"]) == 1
    assert capsys.readouterr().err == "error: the page takes an extra: pip install '.[ui]' in the clone\n"
