"""Several processes that train one model together, and the one that trains alone, behind one small protocol.

    accelerate launch --multi_gpu --num_processes 2 -m lpo train-lpo ...        (one process per GPU)
    accelerate launch --multi_gpu --num_processes 2 -m lpo train-lpo ... --device cpu        (two on a CPU, to try it)

The trainers are written once, for any number of ranks. Every rank holds the same weights, the same prompts and the same
list of pairs; batch sizes count all ranks together. Work on n rows is shared out in equal, contiguous parts: where n
does not divide, the last rows are repeated and carry weight 0. So every rank always has work of the same shape and
takes part in every exchange; none waits for one that does not come. Draws are keyed by row, never by rank, and sums run
over all ranks, so the number of ranks changes speed and rounding, nothing else. Only the main rank writes files.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lpo.config import ConfigError

PATIENCE = datetime.timedelta(minutes=30)  # how long a rank waits for one that has not ended but does not answer either
BUCKET = 2**24  # numbers that travel together: a network's gradients are many small tensors


class LostRank(ConfigError):
    """Another rank ended, so this one cannot go on. If that rank said why, its sentence is the one to show."""


@dataclass(frozen=True)
class Share:
    """One rank's part of n rows: which ones (the last repeated as padding), the first place, and weights 1 or 0."""

    rows: list[int]
    first: int
    weights: list[float]


def portions(share: Share, size: int, same_shape: bool) -> Iterator[Share]:
    """The share's rows, `size` at a time. same_shape: the last portion is filled up too, as compiled code wants it."""
    for start in range(0, len(share.rows), size):
        rows, weights = share.rows[start : start + size], share.weights[start : start + size]
        short = size - len(rows) if same_shape else 0
        yield Share(rows + rows[-1:] * short, share.first + start, weights + [0.0] * short)


class Ranks(Protocol):
    """What a trainer knows of the others. Every call but `share` is made by all ranks, in the same order.

    `device` is the device of this rank, or None where the config decides.
    """

    count: int
    main: bool
    device: str | None

    def share(self, n: int) -> Share: ...
    def gather(self, rows: Tensor, n: int) -> Tensor: ...  # the parts of all shares -> the n rows, in order
    def gather_uneven(self, rows: Tensor) -> Tensor: ...  # any number of rows from each -> all, by rank
    def add(self, tensors: Iterable[Tensor]) -> None: ...  # each becomes its sum over the ranks, in place
    def same(self, tensors: Iterable[Tensor]) -> None: ...  # each becomes the main rank's, in place
    def any(self, flag: bool) -> bool: ...  # whether it is set on some rank; nobody goes on before all have said
    def leave(self) -> None: ...  # after the last call


class Alone:
    """One process: nothing is exchanged, and torch.distributed is never touched."""

    count, main, device = 1, True, None

    def share(self, n: int) -> Share:
        return Share(list(range(n)), 0, [1.0] * n)

    def gather(self, rows: Tensor, n: int) -> Tensor:
        return rows

    def gather_uneven(self, rows: Tensor) -> Tensor:
        return rows

    def add(self, tensors: Iterable[Tensor]) -> None:
        pass

    def same(self, tensors: Iterable[Tensor]) -> None:
        pass

    def any(self, flag: bool) -> bool:
        return flag

    def leave(self) -> None:
        pass


ALONE = Alone()


class Together:
    """The ranks of `accelerate launch` or torchrun: gloo between processes on a CPU, NCCL between GPUs.

    Raises LostRank from every exchange if a rank is gone.
    """

    def __init__(self, cpu: bool):
        from accelerate import PartialState

        self._state = PartialState(cpu=cpu, timeout=PATIENCE)
        self.rank, self.count = self._state.process_index, self._state.num_processes
        self.main = self.rank == 0
        self._device = self._state.device
        self.device = "cpu" if cpu else str(self._device)

    def share(self, n: int) -> Share:
        size = -(-n // self.count)
        places = range(self.rank * size, (self.rank + 1) * size)
        return Share([min(i, n - 1) for i in places], places.start, [float(i < n) for i in places])

    def gather(self, rows: Tensor, n: int) -> Tensor:
        mine = rows.to(self._device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        with _exchange():
            torch.distributed.all_gather(parts, mine)
        return torch.cat(parts)[:n].to(rows.device)

    def gather_uneven(self, rows: Tensor) -> Tensor:
        counts = self.gather(torch.tensor([len(rows)]), self.count).tolist()
        size = max(counts)
        if size == 0:
            return rows
        padded = rows.new_zeros(size, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self.gather(padded, self.count * size).split(size)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def add(self, tensors: Iterable[Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(self._device)
            with _exchange():
                torch.distributed.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def same(self, tensors: Iterable[Tensor]) -> None:
        self.add([tensor if self.main else tensor.zero_() for tensor in (t.detach() for t in tensors)])

    def any(self, flag: bool) -> bool:
        return bool(self.gather(torch.tensor([int(flag)]), self.count).any())

    def leave(self) -> None:
        self._state.destroy_process_group()


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """Inside, the loss of another rank (a closed connection, or none that answers) becomes one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostRank(
            "Another process of this training ended without a word, most likely because memory ran out: choose smaller "
            "batches and --resume."
        ) from error


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, about BUCKET numbers at a time, one dtype at a time."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (sum(t.numel() for t in bucket) + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def join(device: str) -> Ranks:
    """The ranks that this process belongs to, as its launcher's environment says; `device` as in the config.

    Raises ConfigError for a device that does not go with several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        return ALONE
    count = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {device!r}, but {count} processes train together: use auto, or cpu.")
    wants_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    cpu = wants_cpu or (device == "auto" and not torch.cuda.is_available())
    if not cpu and count > torch.cuda.device_count():
        raise ConfigError(
            f"{count} processes were started, but this machine has {torch.cuda.device_count()} GPUs: "
            "start at most one process per GPU (--num_processes), or use --device cpu."
        )
    return Together(cpu)
