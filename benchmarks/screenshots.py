"""The pictures of the README, from a real lab that goes once around the loop: pairs from the queue, labels by a
simulated annotator who likes vivid pictures (and is marked as simulated), the `scenes` presets, a blind vote.

    python -m benchmarks.screenshots --data-dir /tmp/lab --out docs/img

About four minutes on two quiet cores. Stopped, it goes on where it was: what is in the data folder is not done
again, and pictures are taken anew.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from sqlalchemy import text

import storage
from benchmarks.labelling import ROOT, wait_for
from lpo.scenes.judge import simulated_vote
from storage import comparisons, labels
from storage import jobs as queue

WHO = "simulated: likes vivid pictures"
MINUTE = 60_000  # milliseconds


class Walk:
    """A browser before a running lab, and the lab's storage beside it."""

    def __init__(self, page: Page, store: storage.Storage, out: Path):
        self.page, self.store, self.out = page, store, out
        self.study = labels.list_studies(store)[0]
        self.who = labels.annotator(store, WHO, kind="simulated")
        self.draw = np.random.default_rng(0)

    def count(self, table: str) -> int:
        with self.store.reader() as session:
            return session.execute(text(f"SELECT COUNT(*) FROM {table}")).scalar()  # noqa: S608  names of ours

    def state(self, kind: str) -> str:
        """Of the newest job of a kind; "" if there is none."""
        found = queue.list_jobs(self.store, kinds=(kind,), limit=1)
        if found and found[0].state == "failed":
            raise SystemExit(f"{kind} failed: {found[0].error}")
        return found[0].state if found else ""

    def shoot(self, name: str) -> None:
        self.page.wait_for_timeout(1500)  # plots and pictures settle
        self.page.screenshot(path=self.out / f"{name}.png")
        print(f"{time.strftime('%H:%M:%S')} {name}.png", flush=True)

    def open(self, tab: str) -> None:
        self.page.click(f"#tab-{tab}-button")
        self.page.wait_for_timeout(2500)  # the lists of checkpoints arrive

    def look(self, digest: str) -> Image.Image:
        return Image.open(self.store.media.path(digest)).convert("RGB")

    def answer(self, item: dict, key: str) -> None:
        """The simulated annotator's answer to one pair."""
        first, second = self.look(item["first"]), self.look(item["second"])
        labels.vote(
            self.store,
            study_id=self.study.id,
            pair_id=item["pair_id"],
            annotator_id=self.who.id,
            choice=simulated_vote("style", first, second, item["prompt"], self.draw),
            left=item["left"],
            milliseconds=1500,
            client_key=f"{key} {self.count('preference')}",  # not the pair's: some are asked twice
        )

    def label(self, count: int) -> None:
        if self.count("preference"):  # a later walk through the same lab is asked whose labels these are
            self.page.get_by_role("button", name="Label under this name").click()
        else:
            for key in ("ArrowLeft", "ArrowRight", "ArrowRight"):
                self.page.wait_for_selector("#label-picker .pp[data-armed=yes]")
                self.page.wait_for_timeout(1800)
                self.page.keyboard.press(key)
        self.page.wait_for_selector("#label-picker .pp[data-armed=yes]")
        self.shoot("label")
        while self.count("preference") < count:
            for item in labels.next_pairs(self.store, self.study.id, self.who.id, 4):
                self.answer(item, "label")
            time.sleep(1)  # the queue refills

    def train(self, kind: str, **settings: object) -> None:
        """Trains with the preset but for `settings`, unless that was done before."""
        self.open("train")
        if kind == "train-lpo":
            self.page.get_by_role("tab", name="2 · Adapter (LPO)").click()
        if not self.state(kind):
            for name, value in settings.items():
                box = self.page.locator(f"#{kind}").get_by_label(name, exact=True)
                box.fill(str(value))
                box.press("Tab")
            self.page.wait_for_timeout(1500)
            self.page.click(f"#{kind}-start")
        elif self.state(kind) == "stopped":
            self.page.click("#train-resume")
        started = time.monotonic()
        while self.state(kind) != "done":
            time.sleep(1)
        print(f"{kind}: {time.monotonic() - started:.0f} s", flush=True)

    def curves(self) -> None:
        self.page.click("#train-look")
        self.page.wait_for_selector("#curves-plot .rp-card img", timeout=10 * MINUTE)
        while self.state("trace") not in ("", "done"):
            time.sleep(1)
        self.shoot("curves")

    def compare(self) -> None:
        self.open("compare")
        if not self.count("comparison"):
            self.page.click("#compare-go")
        while self.state("compare") != "done":
            time.sleep(1)
        while items := comparisons.next_comparison_pairs(self.store, 1, self.who.id, 8):
            for item in items:
                self.answer(item, "vote")
        self.page.locator("#compare-words .vd").wait_for()
        self.shoot("compare")

    def data(self) -> None:
        self.open("data")
        self.page.locator("#data-browser [tabindex], #data-browser button").first.click()
        self.shoot("data")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screenshots", description=__doc__.split(":")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--labels", type=int, default=60)
    parser.add_argument("--iterations", type=int, default=24, help="of LPO")
    parser.add_argument("--chromium", default=os.environ.get("CHROMIUM") or shutil.which("chromium"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "launch.py", "--port", str(port), "--data-dir", str(arguments.data_dir)]
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_for(f"http://127.0.0.1:{port}")
        with sync_playwright() as playwright:
            sandbox = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--disable-gpu", *sandbox])
            page = browser.new_page(viewport={"width": 1280, "height": 720})
            page.set_default_timeout(5 * MINUTE)
            page.goto(f"http://127.0.0.1:{port}")
            walk = Walk(page, storage.open(arguments.data_dir), arguments.out)
            walk.label(arguments.labels)
            walk.train("train-lrm")
            walk.train("train-lpo", iterations=arguments.iterations)
            walk.shoot("train")
            walk.curves()
            walk.compare()
            walk.data()
            browser.close()
    finally:
        server.terminate()
        server.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
