"""How long after the key the next pair is on screen, measured in headless Chromium while the queue refills.

    python -m benchmarks.labelling --votes 200 --size 512

Starts the real server on an empty data folder with made-up pictures and labels them with real key presses. The clock
runs from the key's own time stamp to the frame after the one in which both new pictures were complete, so it includes
everything that the page does in between; it is read with performance.now() in the page, by code that is not the
page's.
"""

import argparse
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

import storage
from storage import labels, media

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("ArrowLeft", "ArrowRight", "ArrowDown", "x", "s")
FIRST_PAIRS, REFILL, PLENTY = 12, 4, 40
PROBE = """() => {
  if (window.labelling) { window.labelling.times = []; window.labelling.idle = []; return; }
  window.labelling = { times: [], idle: [], waiting: false };
  const shown = () => [...document.querySelectorAll('#label-picker .pp-slot img')];
  const sources = () => shown().map((image) => image.src).join(' ');
  addEventListener('keydown', (event) => {
    if (event.key === 'q') {  // a key that nobody listens to: what two frames take on this machine, as it is loaded
      requestAnimationFrame(() => requestAnimationFrame(
        () => window.labelling.idle.push(performance.now() - event.timeStamp)));
      return;
    }
    const before = sources();
    window.labelling.waiting = true;
    const look = () => {
      if (sources() === before || !shown().every((image) => image.complete && image.naturalWidth)) {
        requestAnimationFrame(look);
        return;
      }
      requestAnimationFrame(() => {
        window.labelling.times.push(performance.now() - event.timeStamp);
        window.labelling.waiting = false;
      });
    };
    requestAnimationFrame(look);
  }, { capture: true });
}"""
ARMED = "() => document.querySelector('#label-picker .pp').dataset.armed === 'yes' && !window.labelling.waiting"


def add_pairs(store: storage.Storage, study_id: int, count: int, size: int, seed: int) -> None:
    """Pairs of soft random pictures, `size` pixels wide, at the end of the queue."""
    rng = np.random.default_rng(seed)
    prompt = labels.add_prompts(store, study_id, [f"soft colours, number {seed % 50}"])[0]
    for _ in range(count):
        pictures = []
        for _ in range(2):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            picture = coarse.resize((size, size), Image.Resampling.BICUBIC)
            pictures.append(
                media.add_picture(store, picture, prompt_id=prompt.id, provenance={"imported": "benchmark"})
            )
        labels.add_pair(store, study_id, prompt.id, pictures[0].id, pictures[1].id, "queue")


def measure(
    page, store: storage.Storage, study_id: int, votes: int, size: int, pause: tuple[float, float]
) -> tuple[list[float], list[float]]:
    """Milliseconds from each of `votes` key presses to the next pair on screen, while a thread adds pairs; and from
    presses of a key that does nothing to the second frame after it: what this machine takes at the least.

    `page` is a Playwright page that shows the Label tab; between two keys lie `pause` seconds (least, most).
    """
    over = threading.Event()

    def refill() -> None:
        seed = time.time_ns() % 2**31
        while not over.is_set():
            counts = labels.counts(store, study_id)
            if counts["pairs"] - counts["labels"] < PLENTY:
                add_pairs(store, study_id, REFILL, size, seed)
                seed += 1
            over.wait(0.05)

    thread = threading.Thread(target=refill)
    thread.start()
    try:
        page.wait_for_selector("#label-picker .pp[data-armed=yes]", timeout=60_000)
        page.evaluate(PROBE)
        draw = random.Random(0)
        for _ in range(votes):
            page.wait_for_function(ARMED, timeout=60_000, polling=10)
            time.sleep(draw.uniform(*pause))
            page.keyboard.press("q")
            time.sleep(0.05)
            page.keyboard.press(draw.choice(KEYS))
        page.wait_for_function(f"() => window.labelling.times.length >= {votes}", timeout=60_000)
        return page.evaluate("() => window.labelling.times"), page.evaluate("() => window.labelling.idle")
    finally:
        over.set()
        thread.join()


def p95(times: list[float]) -> float:
    return float(np.percentile(times, 95))


def summary(times: list[float], idle: list[float]) -> str:
    low, high = np.percentile(times, [50, 95])
    words = f"{low:.0f} ms (median), {high:.0f} ms (p95), {max(times):.0f} ms (worst)"
    return f"{len(times)} votes: next pair on screen after {words}; a key that does nothing: {p95(idle):.0f} ms (p95)"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.labelling", description=__doc__.split("\n")[0])
    parser.add_argument("--votes", type=int, default=200)
    parser.add_argument("--size", type=int, default=64, help="pixels of each picture's side")
    parser.add_argument(
        "--pause", type=float, nargs=2, default=(0.2, 0.6), help="seconds between two keys, least and most"
    )
    parser.add_argument("--chromium", default=os.environ.get("CHROMIUM") or shutil.which("chromium"))
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        store = storage.open(Path(folder) / "lab")
        study = labels.create_study(store, "Benchmark", question="Which picture do you prefer?")
        add_pairs(store, study.id, FIRST_PAIRS, arguments.size, 0)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        command = [
            sys.executable,
            "launch.py",
            "--no-workers",
            "--data-dir",
            str(store.data_dir),
            "--port",
            url.rsplit(":")[-1],
        ]
        server = subprocess.Popen(command, cwd=ROOT)
        try:
            wait_for(url)
            sandbox = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--disable-gpu", *sandbox])
            page = browser.new_page(viewport={"width": 1280, "height": 720})
            page.goto(url)
            times, idle = measure(page, store, study.id, arguments.votes, arguments.size, tuple(arguments.pause))
            browser.close()
        finally:
            server.terminate()
            server.wait()
        store.close()
    print(f"{arguments.size} px, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {summary(times, idle)}")
    return 0


def wait_for(url: str, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"The server did not answer within {seconds:.0f} s.")


if __name__ == "__main__":
    raise SystemExit(main())
