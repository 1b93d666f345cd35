"""What several test files share: an empty lab, a real server on a free port, and a page in headless Chromium."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import storage
from storage import comparisons, labels, media, studies

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 90_000  # milliseconds that a step of a page may take: a loaded machine must not make a test fail
CHROMIUM_ARGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(autouse=True)
def fixed_salts(monkeypatch):
    """A study of another base than Scenes draws its salt, and the salt decides which prompts are held out: here the
    first study of a test always gets the first salt, so that no test passes or fails by the split it drew."""
    drawn = count(1)
    monkeypatch.setattr(studies, "secrets", SimpleNamespace(token_hex=lambda size: f"{next(drawn):0{2 * size}x}"))


@pytest.fixture(autouse=True)
def fixed_lots(monkeypatch):
    """Which side a policy's picture is on, and in which order pairs are asked, is drawn by lot: here the same lots in
    every run, for ten of them fall on one side once in 512 times."""
    lots = random.Random(0)
    monkeypatch.setattr(comparisons, "secrets", SimpleNamespace(choice=lots.choice, randbits=lots.getrandbits))


@pytest.fixture
def store(tmp_path):
    """An open storage in an empty data folder."""
    opened = storage.open(tmp_path / "lab")
    yield opened
    opened.close()


@pytest.fixture
def other(tmp_path):
    """A second lab, to send data to."""
    opened = storage.open(tmp_path / "other")
    yield opened
    opened.close()


@pytest.fixture
def lab(store):
    """A Lab without workers on the empty storage."""
    from app.lab import Lab, Settings

    return Lab(store, Settings(data_dir=store.data_dir, workers=False))


@pytest.fixture
def labelled_study(lab):
    """The default study with one label in each split."""
    study = lab.current_study()
    who = labels.annotator(lab.store, "Ada")
    for split in ("train", "heldout"):
        texts = (f"a {size} red circle" for size in range(100))
        text = next(t for t in texts if labels.split_of(t, study.salt) == split)
        prompt = labels.add_prompts(lab.store, study.id, [text])[0]
        pictures = [
            media.add_picture(
                lab.store, Image.new("RGB", (8, 8), (shade, 0, len(text))), prompt_id=prompt.id, provenance={}
            )
            for shade in (10, 200)
        ]
        pair = labels.add_pair(lab.store, study.id, prompt.id, *(p.id for p in pictures), origin="form")
        labels.vote(
            lab.store,
            study_id=study.id,
            pair_id=pair.id,
            annotator_id=who.id,
            choice="first",
            left="first",
            milliseconds=900,
            client_key=f"key {split}",
        )
    return study


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _plain_signals() -> None:
    """A test run in the background of a shell ignores Ctrl-C, and so would its servers: give them the default back."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Server:
    """A running `launch.py`. `url` is its address, `seconds` how long it took to answer the first request."""

    def __init__(self, data_dir: Path, *arguments: str, script: Path = ROOT / "launch.py", wait: bool = True):
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.with_suffix(".log")
        command = [sys.executable, str(script), "--port", str(self.port), "--data-dir", str(data_dir), *arguments]
        started = time.monotonic()
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, preexec_fn=_plain_signals)
        if wait:
            self.wait()
        self.seconds = time.monotonic() - started

    def wait(self, seconds: float = 180.0) -> None:
        """Waits for the first answer, whatever its status."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(f"{self.url}/healthz", timeout=5).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError(f"no answer within {seconds} s: {self.log.read_text()}")

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 120.0) -> int:
        """Sends a signal and waits for the end; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


@pytest.fixture
def start_server(tmp_path):
    """Starts real servers: `start_server("--no-workers", data_dir=..., script=...)`; all are stopped afterwards."""
    servers = []

    def start(*arguments: str, data_dir: Path = tmp_path / "lab", **options) -> Server:
        servers.append(Server(data_dir, *arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(start_server):
    """The real launch.py with its workers, on a free port and an empty data folder."""
    return start_server()


def wait_for(condition, seconds: float = 90.0, what: str = "it"):
    """Polls until `condition()` is true and returns its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def find_chromium() -> str:
    """The browser: $CHROMIUM, then PATH, then installed by apt (as root), then Playwright's own; else one sentence."""
    named = os.environ.get("CHROMIUM")
    if named:
        if not Path(named).exists():
            pytest.fail(f"$CHROMIUM is {named}, where there is no browser; correct or unset it.", pytrace=False)
        return named
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    if os.name == "posix" and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update"], check=False, **quiet)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "install", "-y", "chromium"], check=False, env=environment, **quiet)
        if found := next(filter(None, map(shutil.which, names)), None):
            return found
    from playwright.sync_api import sync_playwright

    subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    if not Path(path).exists():
        pytest.fail(
            "No Chromium was found or could be installed; install it and name its path in $CHROMIUM.", pytrace=False
        )
    return path


@pytest.fixture(scope="session")
def chromium():
    """One headless Chromium for the whole test run."""
    path = find_chromium()
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=SECONDS)
    sandbox = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=[*CHROMIUM_ARGS, *sandbox])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A fresh page (1280 x 720) without cookies."""
    context = chromium.new_context(viewport={"width": 1280, "height": 720})
    context.set_default_timeout(SECONDS)
    yield context.new_page()
    context.close()


def unfold(fold) -> None:
    """Opens a fold or a tab, given by the locator of its head, and gives it a second, as a person does: what Gradio
    mounts in it sets its first value once more, and so undoes what a machine has typed by then."""
    fold.click()
    fold.page.wait_for_timeout(1000)
