"""Resident memory while a stream larger than memory is trained on.

    python benchmarks/stream.py                                   # 20 GB generated on the fly, for a minute
    python benchmarks/stream.py --seconds 600                     # until all 20 GB have passed
    python benchmarks/stream.py --source file                     # an .npy file of 20 GB (sparse: it takes no disk)
    python benchmarks/stream.py --num-workers 1                   # made, or read, by a worker of the DataLoader

A VAE 784-200-20 on binary images, drawn from ten prototypes; in minibatches of 100 as float32, 0.3 MB each. Once a
second the memory of the process is read from /proc (Linux): VmRSS is all of it, RssAnon its own, RssFile the pages of
files that are mapped. Its slope after the warm-up is by least squares.
"""

import math
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch.utils.data import DataLoader, IterableDataset

import pyrovae as pv
from pyrovae.data import Blocks, OnDisk

DIM = 784
KINDS = "VmRSS", "RssAnon", "RssFile", "RssShmem"


@dataclass(frozen=True)
class Options:
    """Train on a stream and print the resident memory."""

    seconds: float = 60
    """At most, of training."""
    gigabytes: float = 20
    """Length of the stream, or size of the file."""
    source: Literal["generated", "file"] = "generated"
    """Images made on the fly, or the rows of an .npy file of zeros."""
    batch_size: int = 100
    """Images in a minibatch."""
    num_workers: int = 0
    """Of the DataLoader."""
    warm_up: float = 15
    """Seconds that the slope leaves out."""
    every: int = 5
    """Seconds from row to row of the table."""
    compile: bool = False
    """Compile training; the warm-up should then be longer."""


@dataclass(frozen=True)
class Images(IterableDataset):
    """Endless minibatches of binary images, each drawn from one of ten prototypes."""

    batch_size: int

    def __iter__(self) -> Iterator[torch.Tensor]:
        prototypes = torch.rand(10, DIM, generator=torch.Generator().manual_seed(0)) ** 3
        while True:
            yield torch.bernoulli(prototypes[torch.randint(10, (self.batch_size,))])


@dataclass
class Measured(IterableDataset):
    """The minibatches of a loader, counted, until so many bytes have passed or the time is over.

    `fit` looks at the first minibatch and measures 10,000 data before and after the epoch, which must be there.
    """

    loader: Any
    most: float
    seconds: float
    bytes: int = 0
    end: float = math.inf
    over: threading.Event = field(default_factory=threading.Event)

    def __iter__(self) -> Iterator[torch.Tensor]:
        given = 0
        for loaded in self.loader:
            batch = loaded["x"] if isinstance(loaded, dict) else loaded
            if given >= 10_000 and self.end == math.inf:  # more than is measured: training has begun
                self.end = time.monotonic() + self.seconds
            if given > 10_000 and (self.bytes >= self.most or time.monotonic() > self.end):
                break
            given += len(batch)
            self.bytes += batch.nbytes
            yield batch
        self.over.set()


class Watch(threading.Thread):
    """Reads the memory of this process and of its children once a second."""

    def __init__(self, stream: Measured):
        super().__init__(daemon=True)
        self.stream, self.rows = stream, []

    def run(self) -> None:
        start = time.monotonic()
        while not self.stream.over.wait(1.0):
            self.rows.append((time.monotonic() - start, self.stream.bytes / 1e9, *resident()))


def resident() -> list[float]:
    """VmRSS, RssAnon and RssFile of this process, and its children's own memory; MiB."""
    own = memory("self")
    lists = (path.read_text().split() for path in Path("/proc/self/task").glob("*/children"))
    workers = [memory(pid) for pid in chain.from_iterable(lists)]
    return [*(own[kind] for kind in KINDS[:3]), sum(child["RssAnon"] + child["RssShmem"] for child in workers)]


def memory(pid: str) -> dict[str, float]:
    """Of a process, in MiB; 0 for one that has ended."""
    found = dict.fromkeys(KINDS, 0.0)
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return found
    values = (line.split() for line in lines)
    return found | {name[:-1]: int(value[0]) / 1024 for name, *value in values if name[:-1] in KINDS}


def slope(t: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of y over t, and its standard error."""
    t = t - t.mean()
    found = (t @ y) / (t @ t)
    left = y - y.mean() - found * t
    return found, ((left @ left) / (len(t) - 2) / (t @ t)) ** 0.5


def loader_of(options: Options, folder: str) -> DataLoader:
    """Minibatches that are made or read."""
    if options.source == "generated":
        return DataLoader(Images(options.batch_size), batch_size=None, num_workers=options.num_workers)
    path, rows = f"{folder}/x.npy", int(options.gigabytes * 1e9) // (4 * DIM)
    np.lib.format.open_memmap(path, "w+", np.float32, (rows, DIM))
    data = OnDisk(path)
    return DataLoader(data, options.batch_size, sampler=Blocks(data), num_workers=options.num_workers)


def main(options: Options) -> None:
    """Print the table and the slopes."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        stream = Measured(loader_of(options, folder), options.gigabytes * 1e9, options.seconds)
        watch = Watch(stream)
        watch.start()
        program = pv.VAE.mlp(DIM, 20, (200,))
        loader = DataLoader(stream, batch_size=None)
        history = pv.fit(program, loader, epochs=1, seed=0, compile=options.compile, progress=False)
        watch.join()
    names = "seconds", "GB passed", "VmRSS", "RssAnon", "RssFile", "workers"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {options}")
    print(" ".join(f"{name:>10}" for name in names) + "   (MiB)")
    for row in watch.rows[:: options.every]:
        print(f"{row[0]:10.0f} {row[1]:10.2f} " + " ".join(f"{value:10.1f}" for value in row[2:]))
    rows = np.array([row for row in watch.rows if row[0] > options.warm_up])
    for name, column in zip(names[2:], rows.T[2:], strict=True):
        found, error = (60 * value for value in slope(rows[:, 0], column))
        print(f"{name:>8}: {found:+.2f} ± {error:.2f} MiB a minute, {np.ptp(column):.1f} MiB between its extremes")
    print(f"trained {history[-1]['seconds']:.0f} s, ELBO {history[-1]['elbo']:.2f}, {stream.bytes / 1e9:.2f} GB in all")


if __name__ == "__main__":
    main(tyro.cli(Options))
