"""One process or several on one job: Lightning Fabric starts them, torch.distributed carries what they share."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, product
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from pyrovae.arguments import check_whole
from pyrovae.batches import Batch, num_rows
from pyrovae.noise import draw_seed, forked

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """A group of processes, in step: each of its methods is called by all, or by none.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        device: that this process computes on.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def start(device: str | torch.device = "auto", devices: int | None = None, num_nodes: int = 1) -> "Processes":
        """Join the processes that a launcher has started, or start them: each then runs the present script.

        Args:
            device: auto, cpu, cuda or mps; or one that is in use.
            devices: processes on each machine, each with a device of its own; 1: this process alone. None: those
                that `torchrun`, Fabric's launcher or a call before this one has started; else one.
            num_nodes: machines.

        Raises:
            ValueError: for numbers below 1, or other than a launcher has started; for a Python prompt or notebook,
                which cannot start others; for a device that is not here.
        """
        check_whole(num_nodes=num_nodes, **({} if devices is None else {"devices": devices}))
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("Expected device to be one that is here; got 'cuda', and torch finds none")
        if devices is None and num_nodes == 1:
            devices, num_nodes = _launched()
        size = (devices or 1) * num_nodes
        _check_launched(size)
        if dist.is_available() and dist.is_initialized():
            return Processes(dist.get_rank() if size > 1 else 0, size, _device_here(device))
        if size == 1 and isinstance(device, torch.device):
            return Processes(device=device)
        from lightning_fabric import Fabric

        device = device if isinstance(device, str) else device.type
        try:
            strategy = "ddp" if size > 1 else "auto"
            fabric = Fabric(accelerator=device, strategy=strategy, devices=devices or 1, num_nodes=num_nodes)
            if size > 1 and not dist.is_initialized():  # Fabric's own launcher has done it
                _check_script()
                fabric.launch()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"Expected processes that can be started, {size} in all; got {error}") from error
        return Processes(fabric.global_rank, fabric.world_size, fabric.device)

    # --- what all come to know ---------------------------------------------------------------------

    def gather(self, make: Callable[[], Value]) -> list[Value]:
        """What each process makes, in the order of their ranks.

        Raises:
            Exception: where one of them fails, its error, in all.
        """
        if self.size == 1:
            return [make()]
        own: tuple[Value | None, Exception | None]
        try:
            own = make(), None
        except Exception as error:
            own = None, error
        everyone: list[Any] = [None] * self.size
        with _in_step(self.size):
            dist.all_gather_object(everyone, own if own[1] is None else (None, _portable(own[1])))
        if own[1] is not None:
            raise own[1]
        for _, error in everyone:
            if error is not None:
                raise error
        return [value for value, _ in everyone]

    def together(self, make: Callable[[], Value]) -> Value:
        """What this process makes; where another fails to, its error."""
        made: list[Value] = []
        self.gather(lambda: made.append(make()))
        return made[0]

    def first(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, in all."""
        return self.gather(lambda: make() if self.rank == 0 else None)[0]  # pyright: ignore[reportReturnType]

    def seed(self) -> int:
        """A seed from the first process's generator; each process draws one."""
        return self.gather(draw_seed)[0]

    @torch.no_grad()
    def agree(self, module: nn.Module) -> None:
        """Give all processes the parameters and buffers of the first."""
        if self.size == 1:
            return
        for tensor in module.state_dict().values():
            sent = tensor.detach().to(self.device).contiguous()
            with _in_step(self.size):
                dist.broadcast(sent, 0)
            tensor.copy_(sent)

    @torch.no_grad()
    def sum_gradients(self, parameters: list[nn.Parameter], value: float) -> float:
        """Give each parameter the sum of its gradients over all processes, in one message; of a value, too.

        A parameter without a gradient in any process stays without.
        """
        if self.size == 1:
            return value
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        there = torch.tensor([value, *(p.grad is not None for p in parameters)], dtype=torch.float64)
        total = torch.cat([*(gradient.flatten() for gradient in own), there.to(own[0])])
        with _in_step(self.size):
            dist.all_reduce(total)
        *gradients, there = total.split([*(p.numel() for p in parameters), 1 + len(parameters)])
        for parameter, gradient, found in zip(parameters, gradients, there[1:].tolist(), strict=True):
            if found:
                parameter.grad = gradient.view_as(parameter).to(parameter)
        return there[0].item()

    # --- data --------------------------------------------------------------------------------------

    def share(self, batch: Batch | None) -> Batch | None:
        """This process's rows of a minibatch: every `size`-th; None where it has none."""
        if self.size == 1 or batch is None:
            return batch
        rows = {key: value[self.rank :: self.size] for key, value in batch.items()}
        return rows if num_rows(rows) else None

    def check_same(self, **what: Any) -> None:
        """Raises ValueError where what all processes must have in common differs, as data that are drawn unseeded."""
        if self.size == 1:
            return
        marks = self.gather(lambda: {name: fingerprint(value) for name, value in what.items()})
        for other, name in product(range(self.size), what):
            if marks[other][name] != marks[0][name]:
                raise ValueError(
                    f"Expected the same {name} in all {self.size} processes; got others in process {other} than in "
                    "process 0. Seed what is drawn, or read it from a file"
                )


def is_sharded(data: Any) -> bool:
    """Whether each process reads data of its own: an iterable data set shares itself out, all others are shared out."""
    return isinstance(data, DataLoader) and isinstance(data.dataset, IterableDataset)


def in_step(batches: Iterator[Batch], data: Any, processes: Processes) -> Iterator[tuple[Batch | None, int]]:
    """Minibatches, with their length in all processes; where each has its own, until the last has come to its end.

    A DataLoader of what is shared out is read by all, with the same random numbers.

    Raises:
        ValueError: in all, where one reads other data than another, or of an iterable data set the same.
    """
    if processes.size == 1 or not isinstance(data, DataLoader):
        yield from ((batch, num_rows(batch)) for batch in batches)
        return
    own = is_sharded(data)
    seed = processes.seed()
    with forked(seed):
        common = torch.get_rng_state()
    for step in count():
        noise = torch.get_rng_state()
        if not own:
            torch.set_rng_state(common)
        batch = next(batches, None)
        if not own:
            common = torch.get_rng_state()
            torch.set_rng_state(noise)
        marks = processes.gather(lambda batch=batch: None if batch is None else (num_rows(batch), fingerprint(batch)))
        same = all(mark == marks[0] for mark in marks)
        if own and step == 0 and same:
            raise ValueError(
                f"Expected an iterable data set to give each of {processes.size} processes data of its own; got the "
                "same minibatch in all. Let it skip what is not its share, by torch.distributed.get_rank()"
            )
        if not own and not same:
            raise ValueError(
                f"Expected a DataLoader to give the same minibatches in all {processes.size} processes, which share "
                "them out; got different ones. Seed its generator and its data set"
            )
        if all(mark is None for mark in marks):
            return
        lengths = [0 if mark is None else mark[0] for mark in marks]
        yield batch, sum(lengths) if own else lengths[0]


def shares(
    batches: Iterator[tuple[Batch | None, int]], data: Any, processes: Processes
) -> Iterator[tuple[Batch | None, int]]:
    """This process's rows of each minibatch, with its length in all."""
    for batch, rows in batches:
        yield batch if is_sharded(data) else processes.share(batch), rows


def fingerprint(value: Any) -> Any:
    """Something small that differs where values do: of tensors their shapes, types and sums."""
    if isinstance(value, Mapping):
        return {key: fingerprint(each) for key, each in value.items()}
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype), value.sum(dtype=torch.float64).item()
    return value


def _launched() -> tuple[int | None, int]:
    """Processes on a machine and machines, as a launcher has started them."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), 1
    if dist.is_available() and dist.is_torchelastic_launched():
        size, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return here, size // here
    return None, 1


def _check_launched(size: int) -> None:
    """Raises ValueError where a launcher has started another number of processes, more than one of them wanted."""
    if not dist.is_available():
        there = 1
    elif dist.is_initialized():
        there = dist.get_world_size()
    else:
        there = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else size
    if size not in (1, there):
        raise ValueError(f"Expected devices x num_nodes to be {there}, the processes that are here; got {size}")


def _check_script() -> None:
    """Raises ValueError where there is no script that other processes could run."""
    import __main__

    if not (hasattr(__main__, "__file__") or "LOCAL_RANK" in os.environ):
        raise ValueError("a Python prompt or notebook. Write a script, and start it as always or by torchrun")


def _device_here(device: str | torch.device) -> torch.device:
    """Of a process whose group was there before."""
    if isinstance(device, torch.device):
        return device
    cuda = device == "cuda" or (device == "auto" and dist.get_backend() == "nccl")
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _portable(error: Exception) -> Exception:
    """An error that can be sent: of a builtin kind and with its message."""
    kinds = ValueError, FileNotFoundError, FileExistsError, OSError, FloatingPointError
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    return kind(str(error))


@contextmanager
def _in_step(size: int) -> Iterator[None]:
    """Say what happened where a process does not take part."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"Expected all {size} processes to take part; at least one has failed or was killed, as its own message "
            f"tells: {str(error).splitlines()[0]}"
        ) from error
