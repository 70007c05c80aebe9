"""Data larger than memory, for a torch `DataLoader`: files read row by row, their shuffling, epochs of a stream."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler


def as_floats(x: np.ndarray) -> Tensor:
    """A float32 tensor; bytes are scaled to [0, 1].

    Raises:
        ValueError: for an array of another kind than floats, bytes or booleans.
    """
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 255
    elif x.dtype.kind not in "fb":
        raise ValueError(f"Expected an array of floats, bytes (uint8) or booleans; got {x.dtype}")
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


class OnDisk(Dataset[dict[str, Tensor]]):
    """The rows of `.npy` files, read from the disk as they are asked for, and never held.

    It is made for a `DataLoader`, `DataLoader(OnDisk("x.npy"), batch_size=100, sampler=...)`. Rows come out as `load`
    has them: float32 vectors `(D,)`, bytes scaled to [0, 1]; beside `lengths` sequences `(T, D)`. Whole numbers `(N,)`,
    as labels and lengths, are int64. The files are read and not mapped into memory: pages of a mapped file count as
    the process's memory, and a mapped file that is cut ends the process.

    Args:
        files: path of an `.npy` file, whose rows are `x`; or a dict of paths, named as the arguments of the program.

    Raises:
        ValueError: for what is no `.npy` file, pickled objects, values of another kind, Fortran's order, files of no
            rows or of unequal numbers of them, and a file shorter than its header says, also where it becomes so later.
        FileNotFoundError: where a file is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/x.npy", np.full((5, 2, 2), 255, np.uint8))
        ...     data = OnDisk(f"{folder}/x.npy")
        ...     len(data), data[0]["x"], [len(batch["x"]) for batch in DataLoader(data, batch_size=3)]
        (5, tensor([1., 1., 1., 1.]), [3, 2])
    """

    def __init__(self, files: str | Path | Mapping[str, str | Path]):
        self.files = files
        paths = files if isinstance(files, Mapping) else {"x": files}
        self.arrays = {key: _Array.at(Path(path)) for key, path in paths.items()}
        rows = {key: array.shape[0] for key, array in self.arrays.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"Expected files with one common number of rows; got {rows or 'no files'}")

    def __len__(self) -> int:
        return next(iter(self.arrays.values())).shape[0]

    def __getitem__(self, index: int | Iterable[int] | slice) -> dict[str, Tensor]:
        """A row; of several numbers or a slice a dict of `(B, ...)`."""
        if isinstance(index, int):
            return {key: value[0] for key, value in self[[index]].items()}
        numbers = range(len(self))
        numbers = numbers[index] if isinstance(index, slice) else [numbers[i] for i in index]
        flat = "lengths" not in self.arrays
        return {key: array.read(numbers, flat) for key, array in self.arrays.items()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """The rows of a minibatch, read together."""
        batch = self[indices]
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


@dataclass(frozen=True)
class _Array:
    """Where the rows of an `.npy` file stand; `(N, ...)`."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @staticmethod
    def at(path: Path) -> "_Array":
        try:
            array = np.lib.format.open_memmap(path, mode="r")  # its header, which is compared with its size
            if array.ndim == 0 or array.size == 0:
                raise ValueError("it holds no array (N, ...) of at least one row")
            if not array.flags.c_contiguous:
                raise ValueError("its rows are in Fortran's order; np.ascontiguousarray puts them together")
            found = _Array(path, array.dtype, array.shape, array.offset)
            found.read([0], flat=True)
        except ValueError as error:
            raise ValueError(f"Expected an .npy file without pickled objects; got {path}: {error}") from error
        return found

    def read(self, numbers: Sequence[int], flat: bool) -> Tensor:
        """Rows `(B, D)`, or `(B, ...)` as they are."""
        dim = math.prod(self.shape[1:])
        size = dim * self.dtype.itemsize
        content = bytearray()
        with self.path.open("rb", buffering=0) as file:
            for number in numbers:
                file.seek(self.offset + number * size)
                content += file.read(size)
        if len(content) != size * len(numbers):
            raise ValueError(f"Expected {self.path} to keep its {self.shape[0]} rows; got fewer: it was cut")
        rows = np.frombuffer(content, self.dtype).reshape(len(numbers), *self.shape[1:])
        if rows.ndim == 1 and rows.dtype.kind in "iu":
            return torch.from_numpy(rows.astype(np.int64))
        return as_floats(rows.reshape(len(numbers), dim) if flat and rows.ndim > 1 else rows)


class Blocks(Sampler[int]):
    """A random order of N data that reads a file in blocks and holds no list of all data.

    `DataLoader(shuffle=True)` holds a list of all N numbers, about 40 bytes each, and jumps from row to row. Here the
    order of the blocks is random, and each `mixed` of them, one after the other, are shuffled together. It is as good
    as a full shuffle where the file's order tells nothing; a file that is sorted, by class say, wants many blocks.

    Args:
        data: a data set of known length, as `OnDisk`.
        size: rows that follow each other, in a block.
        mixed: blocks whose rows are shuffled together.

    Example:
        >>> sorted(Blocks(range(10), size=3, mixed=2))
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(self, data: Any, size: int = 256, mixed: int = 64):
        if size < 1 or mixed < 1:
            raise ValueError(f"Expected size and mixed to be at least 1; got {size} and {mixed}")
        self.data, self.size, self.mixed = data, size, mixed

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        blocks = torch.randperm(math.ceil(len(self) / self.size), generator=generator)
        for starts in (blocks * self.size).split(self.mixed):
            rows = (starts.unsqueeze(1) + torch.arange(self.size)).flatten()
            rows = rows[rows < len(self)]
            yield from rows[torch.randperm(len(rows), generator=generator)].tolist()


def in_epochs(batches: Iterable[Any] | Callable[[], Iterable[Any]], steps: int) -> DataLoader[Any]:
    """Minibatches of a long or endless stream for `fit`, so many to an epoch: each goes on where the last one stopped.

    Where the stream ends it is begun again. What `fit` measures after an epoch is taken from it, too: the next 10,000
    data. Workers of a `DataLoader` within are started once and not for each epoch.

    Args:
        batches: a `DataLoader`, or any other iterable of minibatches; or a function that returns one.
        steps: minibatches in an epoch.

    Raises:
        ValueError: for steps < 1, and, as it is read, where the stream can be read but once and has come to its end.

    Example:
        >>> def noise():
        ...     while True:
        ...         yield torch.randn(100, 784)
        >>> [len(x) for x in in_epochs(noise, steps=3)]
        [100, 100, 100]
    """
    if steps < 1:
        raise ValueError(f"Expected steps to be at least 1; got {steps}")
    return DataLoader(_Epochs(batches, steps), batch_size=None)


class _Epochs(IterableDataset[Any]):
    """A stream in parts of `steps` minibatches; it is held open from one to the next."""

    def __init__(self, batches: Any, steps: int):
        self.batches, self.steps = batches, steps
        self.open: list[Iterator[Any]] = [iter(())]
        weakref.finalize(self, self.open.clear)  # at the latest while the interpreter still is whole

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.steps):
            try:
                batch = next(self.open[0])
            except StopIteration:
                batch = self._begin()
            yield batch

    def _begin(self) -> Any:
        self.open[0] = iter(self.batches if isinstance(self.batches, Iterable) else self.batches())
        for batch in self.open[0]:
            return batch
        raise ValueError("Expected a stream that can be read again from its beginning, and is not empty; got its end")
