"""Torch's generators: borrowed and put back, and seeded for each of many parts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

import torch

Item = TypeVar("Item")


@contextmanager
def forked(seed: int | None = None) -> Iterator[None]:
    """Put torch's generators back after, those of all devices; with a seed, start from it."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed from a generator; None: from torch's."""
    return int(torch.randint(2**62, (), generator=generator))


def numbered(items: Iterable[Item], seed: int) -> Iterator[tuple[int, Item]]:
    """Each item with its number i, made and worked on from seed + i: its noise is its own, whoever draws it."""
    iterator = iter(items)
    for i in count():
        torch.manual_seed(seed + i)
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield i, item
