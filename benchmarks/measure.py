"""What the speed benchmarks share: the stopwatch with its counters, the common flags, tables and JSON.

Seconds are wall-clock with the GPU waited for at both ends of a phase; on a CPU the processor time is kept too, which
other processes on a busy machine do not lengthen. Network evaluations are counted in rows (one
guidance branch of one latent) by a hook on the mid block. FLOPs are counted by torch.utils.flop_counter (2 per
multiply-add; matrix products, convolutions and attention, forward and backward) in one untimed run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.models import SIZES

MODELS = Path(tempfile.gettempdir()) / "preference-lab-benchmarks"


def flags(description: str) -> argparse.ArgumentParser:
    """The parser with the flags of every speed benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile the repeated blocks (not of the naive)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each pattern, alternating")
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, default=MODELS, help="where the random-weight models are kept")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    return parser


def resolve(arguments: argparse.Namespace) -> None:
    """Replaces 'auto' in device and dtype by what it means here."""
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.dtype == "auto":
        arguments.dtype = "bfloat16" if arguments.device.startswith("cuda") else "float32"


class Meter:
    """Seconds, rows and FLOPs by phase. `with meter("scoring"): ...`; a phase inside another is not counted twice."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        self.stack: list[str] = []
        self.clock = self.processor = 0.0
        self.counter: FlopCounterMode | None = None
        self.counted = 0
        self.reset()

    def times(self) -> dict[str, float]:
        """Seconds by phase; under "processor" the processor's of all phases (0 on a GPU: they say nothing there)."""
        return {**self.seconds, "processor": 0.0 if self.cuda else sum(self.processor_seconds.values())}

    def steady(self) -> dict[str, float]:
        """Seconds by phase: the processor's on a CPU, which a busy machine does not lengthen, else wall-clock."""
        return dict(self.seconds if self.cuda else self.processor_seconds)

    def reset(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.processor_seconds: dict[str, float] = defaultdict(float)
        self.rows: dict[str, int] = defaultdict(int)
        self.flops: dict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._turn()
        self.stack.append(phase)
        try:
            yield
        finally:
            self._turn()
            self.stack.pop()

    def _turn(self) -> None:
        """Books what has passed since the last turn to the phase that was running."""
        if self.cuda:
            torch.cuda.synchronize()
        now, processor = time.perf_counter(), time.process_time()
        total = self.counter.get_total_flops() if self.counter else 0
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.clock
            self.flops[self.stack[-1]] += total - self.counted
            self.processor_seconds[self.stack[-1]] += processor - self.processor
        self.clock, self.counted, self.processor = now, total, processor

    @contextlib.contextmanager
    def counting_flops(self) -> Iterator[None]:
        with FlopCounterMode(display=False, custom_mapping={**CPU_ATTENTION}) as self.counter:
            self.counted = 0
            yield
        self.counter = None

    def watch(self, net: torch.nn.Module, name: str) -> None:
        """Counts the rows of every run of `net` (a UNet, whole or cut) as `name`, those that carry gradients apart."""

        def count(_module: torch.nn.Module, inputs: tuple, keywords: dict) -> None:
            rows = len(inputs[0] if inputs else keywords["hidden_states"])
            self.rows[f"{name} with gradients" if torch.is_grad_enabled() else name] += rows

        net.mid_block.register_forward_pre_hook(count, with_kwargs=True)

    def timed(self, phase: str, function: Callable) -> Callable:
        def inside(*arguments, **keywords):
            with self(phase):
                return function(*arguments, **keywords)

        return inside


def _attention_flops(query, key, value, *_rest, **_options) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad, query, key, value, *_rest, **_options) -> int:
    # As for the GPU kernels: two and a half times the forward, for it computes the scores again.
    return sdpa_flop_count(query, key, value) * 5 // 2


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def resident_bytes() -> int:
    """This process's resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_of(device: str, work: Callable[[], object]) -> int:
    """Bytes that `work` takes at its peak: CUDA's own count, or the growth of the resident set on a CPU (Linux)."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        kept = work()
        peak = torch.cuda.max_memory_allocated()
    else:
        before = resident_bytes()
        kept = work()
        peak = max(0, _high_water() - before)
    del kept
    return peak


def _high_water() -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_child(module: str, arguments: argparse.Namespace, *extra: str) -> int:
    """The number that `python -m module ... extra` prints last: memory is measured in a process of its own."""
    command = [sys.executable, "-m", module, *extra]
    for name, value in vars(arguments).items():
        if name in ("out", "memory_of") or value is None or value is False or value == []:
            continue
        words = [] if value is True else value if isinstance(value, list) else [value]
        command += [f"--{name.replace('_', '-')}", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def alternate(patterns: dict[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Runs the patterns in turn, `repeats` times; each run returns its seconds by phase."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in patterns}
    for _ in range(repeats):
        for name, run in patterns.items():
            runs[name].append(run())
    return runs


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Of neighbouring runs, so that a machine that slows down slows both."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def machine(device: str) -> dict:
    """What the numbers were measured on."""
    cpu = next(
        (s.split(":", 1)[1].strip() for s in _lines("/proc/cpuinfo") if s.startswith("model name")),
        platform.processor(),
    )
    return {
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "cpu": cpu or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def name_of(where: dict) -> str:
    chip = where["gpu"] or f"{where['cpu']}, {where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    return f"{chip}, torch {where['torch']}, load {where['load']}"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def carry_out(
    module: str,
    arguments: argparse.Namespace,
    run: Callable[[argparse.Namespace, Path], dict],
    report: Callable[[dict], str],
    patterns: Sequence[str] = ("ours",),
) -> int:
    """The main function of a benchmark: `run(arguments, scratch folder)`, the peak memory of each pattern in a process
    of its own, then `report(result)` and the JSON file. As such a process it prints its peak alone."""
    with tempfile.TemporaryDirectory() as name:
        result = run(arguments, Path(name))
    if arguments.memory_of:
        print(result["peak"])
        return 0
    wanted = () if arguments.no_memory else patterns
    result["memory"] = {name: in_child(module, arguments, "--memory-of", name) for name in wanted}
    print(report(result))
    write(result, arguments.out)
    return 0


def write(result: dict, out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
