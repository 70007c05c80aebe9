"""`fit`: what is asked of a training run, and whether it can be done."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pyro
import torch
from pyro.infer import ELBO

from pyrovae import checkpoint
from pyrovae.arguments import check_number, check_one_of, check_seed
from pyrovae.batches import Data, as_data, count
from pyrovae.bounds import bound, check_bound
from pyrovae.compiled import Compile
from pyrovae.conditionals.conditional import PRECISIONS
from pyrovae.noise import forked
from pyrovae.processes import Processes
from pyrovae.program import LatentModel
from pyrovae.run import History, Run, steps_in
from pyrovae.schedules import Schedule, check_kl_weight
from pyrovae.supervision import Labels
from pyrovae.traces import check_arguments

DEVICES = ("auto", "cpu", "cuda", "mps")
OPTIONAL = ("labeled_batch_size", "patience", "grad_clip")


def fit(
    program: LatentModel,
    train: Any = None,
    val: Any = None,
    *,
    labeled: Any = None,
    supervised_weight: float | None = None,
    labeled_batch_size: int | None = None,
    labels: Labels = "enumerate",
    elbo: ELBO | None = None,
    kl_weight: float | Schedule = 1.0,
    free_bits: float | tuple[float, int] | None = None,
    epochs: int = 100,
    batch_size: int = 100,
    lr: float | Callable[[int], float] = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    patience: int | None = None,
    grad_clip: float | None = None,
    seed: int | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    devices: int | None = None,
    num_nodes: int = 1,
    precision: str = "32-true",
    compile: Compile = False,
    progress: bool = True,
) -> History:
    """Train a program by stochastic variational inference (Kingma and Welling 2019, Algorithm 1).

    Each step takes the loss of `elbo(program.model, program.guide)` on a minibatch, a sum over its data as Pyro has
    it, and one step of one torch optimizer on all parameters; those that appear only when the program first runs are
    found. It is what `pyro.infer.SVI` does, and draws the same random numbers.

    With `labeled`, each step takes a minibatch of `train`, whose label is unknown, and one of `labeled`, and estimates

        sum L(x, y) over labeled + sum U(x) over train + supervised_weight * mean -log q(y | x) over labeled

    without bias, whatever their sizes; q(y | x) is read from the guide (Kingma et al. 2014, eq. 6 to 9). L and U are
    the losses of data whose label is shown and not. Without `labeled`, a program with a label that `train` does not
    show, as the cluster of a mixture, is trained by U alone.

    Memory does not grow with the data of a `DataLoader`: two minibatches are held at most, beside those that its
    workers have ready, and the order that its own `shuffle=True` draws (`data.Blocks` holds none). After each epoch
    it is read again from its beginning, as far as is measured; where it cannot be, or never ends, `data.in_epochs`
    cuts it into epochs.

    What `check` can tell cheaply of the program is looked at on the first data, and a warning given for each finding.

    With `val`, the weights that were best on it are in the program at the end, also when training stops
    with an error: by its error of classification where `labeled` is given and `val` has labels, else by its ELBO.

    Args:
        program: a `LatentModel`.
        train: a tensor `(N, D)`, a pair (x, y), a dict of tensors, a `Data`, or a torch `DataLoader`, which then
            says itself how it shuffles and what a minibatch is. With `labeled` it may be None.
        val: likewise; it chooses the best weights and stops training early.
        labeled: data with labels, in memory: a pair (x, y), a dict or a `Data`.
        supervised_weight: of the classification term; None for 0.1 times the number of all data, as in the paper.
        labeled_batch_size: labelled data in a minibatch; None for `batch_size`.
        labels: unknown ones are summed over (enumerate, by `TraceEnum_ELBO` in the place of `elbo`, with its
            particles) or drawn from q(y | x) (sample).
        elbo: any `pyro.infer.ELBO`; by default `Trace_ELBO()`. Where labels are summed over it is one of Pyro's.
        kl_weight: beta, by which the KL term of `elbo` is multiplied; or a function that gives it for each step,
            counted from 0, as `Linear(1000)` and `Cyclical(1000)`; it must reach 1 before training ends.
        free_bits: nats that each latent site's KL, averaged over the minibatch, costs nothing below; with a second
            number, those of each of so many groups of its dimensions. It stands for `elbo=FreeBits_ELBO(...)`.
        epochs: passes over `train`, those before `resume` included.
        batch_size: data in a minibatch.
        lr: learning rate, or a function that gives it for each epoch, 1 to `epochs`.
        optimizer: called with the parameters and `lr`; by default `torch.optim.Adam`, fused.
        patience: stop after so many epochs without a better ELBO on `val`.
        grad_clip: largest L2 norm of the minibatch's gradient.
        seed: of minibatches and noise; torch's random state is put back after. None goes on from the present one.
        run_dir: folder for config.json, metrics.csv, model.safetensors (the best weights), and checkpoint.pt,
            written after an epoch, once a second at most, and when training stops, also by SIGTERM. One run at a
            time holds it.
        resume: go on from the checkpoint in `run_dir`, to the very weights that an undisturbed run reaches. Torch's,
            NumPy's and Python's generators are put where they were; one of a DataLoader's own is not.
        device: auto, cpu, cuda or mps; the program stays there.
        devices, num_nodes: processes on each machine, each with a device of its own, and machines. They share each
            minibatch of `batch_size` out and add up their gradients, so that their number changes nothing but the
            noise, which each draws for itself; a bound of the minibatch as a whole (free bits, batch norm) sees a
            share of it. All read the same data, but an iterable data set, of which each must read its own. None:
            the processes that `torchrun` or Fabric's launcher has started; more than there are run this script again
            from its start. Files are written once.
        precision: 32-true (as the program's parameters are) or bf16-mixed (the networks of all
            Conditionals in bfloat16; densities, weights and optimizer stay).
        compile: run loss and gradients as one compiled graph; compiling takes seconds, for each shape of a minibatch.
            "auto" goes on uncompiled, with a warning, where the program or the machine does not allow it.
        progress: show a progress bar.

    Returns:
        A dict for each epoch: `loss`, the mean objective over the epoch; `elbo`, `log_px_z` and `kl`, measured after
        it with one draw for each datum, in eval mode, on the training data (10,000 of them at most, classes summed over
        counted each); `val_elbo`, `val_log_px_z`, `val_kl`; `seconds`. Nats, per datum, and the true ELBO, whatever was
        optimised; `kl_weight` of the epoch's last step, where it is not 1. With `labeled`, `elbo` is -U, `labeled_elbo`
        -L with its two parts, `cross_entropy` -log q(y | x) of the labelled data, and `val_error` the share of
        validation data that q(y | x) misclassifies.

    Raises:
        ValueError: for bad data or settings, labels that are none of the classes, a program without a label, data
            outside the support of the likelihood, latents of model and guide that do not fit, a program without
            parameters, a checkpoint of another run, processes that do not read the same data.
        CompileError: where `compile` is True and the program cannot be compiled, or there is no C++ compiler.
        FileExistsError, FileNotFoundError: where `run_dir` is there and should not be, or the other way round.
        BlockingIOError: where another run is going on in `run_dir`.
        OSError: where `run_dir` cannot be written; the files that it has stay, and the program has the best weights.
        FloatingPointError: where the loss is not finite, naming the site; the last good checkpoint stays.
        ConnectionError: where another process has failed or was killed; the last good checkpoint stays.

    Example:
        >>> from pyrovae import LinearGaussian, fit
        >>> program, x = LinearGaussian(5, 2), torch.randn(64, 5)
        >>> history = fit(program, x, epochs=2, progress=False)
        >>> sorted(history[-1])
        ['elbo', 'epoch', 'kl', 'log_px_z', 'loss', 'seconds']
    """
    check_arguments(program)
    rate = lr if callable(lr) else lambda epoch: lr
    check_bound(elbo, kl_weight, free_bits, labeled)
    elbo = bound(free_bits) if elbo is None else elbo
    optimizer = partial(torch.optim.Adam, fused=True) if optimizer is None else optimizer
    _check_positive(epochs=epochs, batch_size=batch_size, labeled_batch_size=labeled_batch_size)
    _check_positive(lr=rate(1), patience=patience, grad_clip=grad_clip)
    check_one_of(DEVICES, device=device)
    check_one_of(PRECISIONS, precision=precision)
    check_one_of(get_args(Labels), labels=labels)
    _check_objects(elbo, optimizer)
    if seed is not None:
        check_seed(seed)
    if patience is not None and val is None:
        raise ValueError("Expected val with patience: early stopping goes by the ELBO on validation data; got None")
    if resume and run_dir is None:
        raise ValueError("Expected run_dir with resume=True; got None")
    train, val, labeled = (
        None if data is None else as_data(data, name)
        for name, data in (("train", train), ("val", val), ("labeled", labeled))
    )
    _check_data(train, labeled, supervised_weight)
    steps = steps_in(labeled if train is None else train, batch_size)
    check_kl_weight(kl_weight, None if steps is None else epochs * steps)
    settings = {
        "elbo": type(elbo).__name__,
        "kl_weight": _name(kl_weight) if callable(kl_weight) else kl_weight,
        "free_bits": list(free_bits) if isinstance(free_bits, tuple) else free_bits,
        "batch_size": batch_size,
        "lr": _name(lr) if callable(lr) else lr,
        "optimizer": _name(optimizer),
        "grad_clip": grad_clip,
        "seed": seed,
        "precision": precision,
        "compile": compile,
        "num_train": None if train is None else count(train),
        "num_val": None if val is None else count(val),
        "num_labeled": None if labeled is None else count(labeled),
        "supervised_weight": supervised_weight,
        "labeled_batch_size": labeled_batch_size or batch_size,
        "labels": labels,
    }
    folder = None if run_dir is None else Path(run_dir)
    processes = Processes.start(device, devices, num_nodes)
    with ExitStack() as stack:
        saved = None if folder is None else processes.first(lambda: _opened(folder, resume, stack))
        stack.enter_context(_ending_at_sigterm())
        if seed is not None:
            stack.enter_context(forked(seed))
        stack.enter_context(pyro.validation_enabled(False))
        run = Run(program, train, val, labeled, elbo, kl_weight, optimizer, rate, settings, folder, processes)
        stack.enter_context(program.scope())
        if saved is not None:
            run.resume(saved)
        run.to_the_end(epochs, patience, progress)
    return run.history


def _opened(folder: Path, resume: bool, stack: ExitStack) -> dict[str, Any] | None:
    """The checkpoint to resume from, or None, in a folder that is held until training ends."""
    stack.enter_context(checkpoint.locked(folder, resume))
    return checkpoint.open_run(folder, resume)


@contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """SIGTERM, with which a cluster takes its machine back, ends training as an exception does."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        whole = name not in ("lr", "local_lr", "grad_clip")
        sound = isinstance(value, int) if whole else isinstance(value, int | float)
        if value is None and name in OPTIONAL:
            continue
        if isinstance(value, bool) or value is None or not (sound and value > 0 and math.isfinite(value)):
            raise ValueError(f"Expected {name} to be a positive {'whole ' if whole else ''}number; got {value!r}")


def _check_data(train: Any, labeled: Any, supervised_weight: float | None) -> None:
    if train is None and labeled is None:
        raise ValueError("Expected train, or labeled; got neither")
    if labeled is None and supervised_weight is not None:
        raise ValueError("Expected labeled, data with labels, with supervised_weight; got None")
    if supervised_weight is not None:
        check_number(supervised_weight=supervised_weight)
    if labeled is not None and not isinstance(labeled, Data):
        raise ValueError("Expected labeled to be tensors or a Data, in memory; got a DataLoader")
    if labeled is not None and train is not None and count(train) is None:
        raise ValueError("Expected train of known length with labeled; got an iterable data set")


def _check_objects(elbo: Any, optimizer: Any) -> None:
    if not isinstance(elbo, ELBO) or not hasattr(elbo, "differentiable_loss"):
        raise ValueError(
            f"Expected elbo to be a pyro.infer.ELBO with a differentiable_loss, as Trace_ELBO(); got {elbo!r}"
        )
    if not callable(optimizer):
        raise ValueError(f"Expected optimizer to be a class or function of torch.optim; got {type(optimizer).__name__}")


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, partial):
        options = ", ".join(f"{key}={value}" for key, value in sorted(function.keywords.items()))
        return f"{_name(function.func)}({options})"
    return repr(function) if is_dataclass(function) else getattr(function, "__name__", type(function).__name__)
