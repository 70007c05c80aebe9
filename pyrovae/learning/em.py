"""EM in the place of an encoder: a guide with parameters for each datum, or draws from the posterior itself."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor
from tqdm import tqdm

from pyrovae.arguments import check_whole
from pyrovae.batches import Batch, Data
from pyrovae.evaluate import evaluate
from pyrovae.fit import _check_objects, _check_positive
from pyrovae.labels import without
from pyrovae.learning.chains import Chains
from pyrovae.learning.local import FIRST, LocalGuide, prepared, running
from pyrovae.learning.map import model_parameters
from pyrovae.learning.wake_sleep import WakeSleep_ELBO
from pyrovae.measure import SEED
from pyrovae.noise import draw_seed, forked
from pyrovae.program import LatentModel
from pyrovae.run import History

Rate = float | Callable[[int], float]
STARTS = 100  # draws from p(z), at the likeliest of which `fit_guide` begins
FINAL = 0.01  # learning rate of `fit_guide` at its end, in parts of the first


def _epochs(
    program: LatentModel,
    theta: list[Any],
    data: Data,
    step: Callable[[Batch, int], Tensor],
    measure: Callable[[], dict[str, float]],
    epochs: int,
    batch_size: int,
    lr: Rate,
    progress: bool,
) -> History:
    """EM: in each step what `step` does for a minibatch, and a step of Adam in theta on the loss that it gives."""
    rate = lr if callable(lr) else lambda epoch: lr
    optimizer = torch.optim.Adam(theta, lr=rate(1), fused=True)
    with forked():  # the order of the data has a generator of its own, as in `fit`
        generator = torch.Generator().manual_seed(draw_seed())
    history: History = []
    best, kept = -math.inf, None
    bar = tqdm(total=epochs * math.ceil(len(data) / batch_size), unit=" steps", mininterval=0.5, disable=not progress)
    for epoch in range(1, epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(epoch)
        start = time.perf_counter()
        for batch in data.batches(batch_size, shuffle=generator):
            loss = step(batch, epoch)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"Expected a finite loss; got {loss.item()} in epoch {epoch}")
            optimizer.zero_grad()
            loss.backward(inputs=theta)
            optimizer.step()
            bar.update()
        row = {"epoch": epoch, "seconds": time.perf_counter() - start, **measure()}
        history.append(row)
        if row.get("val_elbo", -math.inf) > best:
            best, kept = row["val_elbo"], {name: value.clone() for name, value in program.state_dict().items()}
        bar.set_postfix_str(", ".join(f"{key} {row[key]:.2f}" for key in ("elbo", "log_joint") if key in row))
    bar.close()
    if kept is not None:
        program.load_state_dict(kept)
    return history


def variational_em(
    program: LocalGuide,
    train: Any,
    val: Any = None,
    *,
    steps: int = 5,
    local_lr: Rate = 0.05,
    elbo: ELBO | None = None,
    epochs: int = 100,
    batch_size: int = 100,
    lr: Rate = 1e-3,
    seed: int | None = None,
    progress: bool = True,
) -> History:
    """Variational EM: no encoder, but variational parameters for each datum, in turn with those of the model.

    For each minibatch an E-step, `steps` gradient steps on the ELBO in its data's own mu_i and log sigma_i, theta
    fixed, then an M-step, one gradient step in theta. They are kept from epoch to epoch.

    Where it comes to rest: at a maximum of the ELBO over theta and all local parameters, which is maximum likelihood
    where the posterior is a diagonal Gaussian in unconstrained space at the optimum, as in probabilistic PCA, whose
    axes turn until it is. Else theta pays for the gap, as any mean-field guide makes it; an encoder's further error
    (amortization gap) is not there. Beside that there is the noise of draws, which falls with both learning rates.

    Args:
        program: `LocalGuide.of(program, train)`; the model's parameters are those of the program within.
        train: in memory, as for `LocalGuide.of`; binarized once, for a datum that is drawn anew at each showing has no
            posterior of its own.
        val: likewise; a guide of its own gets as many steps on it in each epoch, theta fixed.
        steps: of each E-step.
        local_lr: learning rate of E-steps, or a function that gives it for each epoch.
        elbo: as for `fit`.
        epochs, batch_size, lr, seed, progress: as for `fit`.

    Returns:
        A dict for each epoch: `epoch`, `seconds`, and, measured after it with one draw for each datum, `elbo` and
        `val_elbo`; nats per datum.

    Raises:
        ValueError: for what is not a `LocalGuide`, data that are not those that it is for, or bad settings.
        FloatingPointError: where the loss is not finite.

    Source:
        Kingma and Welling (2019), appendix A.2; Neal and Hinton (1998) for EM by parts. Steps are Adam's.

    Example:
        >>> from pyrovae import LinearGaussian
        >>> program, x = LinearGaussian(5, 2), torch.randn(64, 5)
        >>> history = variational_em(LocalGuide.of(program, x), x, epochs=2, progress=False)
        >>> sorted(history[-1])
        ['elbo', 'epoch', 'seconds']
    """
    if not isinstance(program, LocalGuide):
        raise ValueError(
            f"Expected program to be a LocalGuide; got {type(program).__name__}. "
            "LocalGuide.of(program, train) gives one"
        )
    rate = local_lr if callable(local_lr) else lambda epoch: local_lr
    _check_settings(elbo, epochs, batch_size, lr, steps=steps, local_lr=rate(1))
    bound: Any = Trace_ELBO() if elbo is None else elbo
    with running(program, seed), ExitStack() as stack:
        parts = {"": (program, prepared(program, train, "train"))}
        if val is not None:
            beside = LocalGuide.of(program.program, val)
            parts["val_"] = beside, prepared(beside, val, "val")
        inner = {
            name: torch.optim.SparseAdam(stack.enter_context(local.sparse()), lr=rate(1))
            for name, (local, _) in parts.items()
        }

        def step(batch: Batch, epoch: int) -> Tensor:
            program.train()
            _e_step(program, batch, bound, inner[""], steps, rate(epoch))
            return bound.differentiable_loss(program.model, program.guide, **batch)

        def measure() -> dict[str, float]:
            if val is not None:
                local, data = parts["val_"]
                with forked():  # training draws what it draws without val
                    for batch in data.batches(batch_size):
                        _e_step(local.eval(), batch, bound, inner["val_"], steps, inner[""].param_groups[0]["lr"])
            seen = {name: evaluate(*part, 1, seed=SEED, progress=False) for name, part in parts.items()}
            return {f"{name}elbo": found.elbo.mean().item() for name, found in seen.items()}

        theta = _theta(program.program, parts[""][1])
        return _epochs(program, theta, parts[""][1], step, measure, epochs, batch_size, lr, progress)


def _theta(program: LatentModel, data: Data) -> list[Any]:
    return list(model_parameters(program, without("index", next(data.batches(FIRST)))).values())


def _check_settings(elbo: Any, epochs: int, batch_size: int, lr: Rate, **others: Any) -> None:
    rates = {name: value for name, value in others.items() if name.endswith("lr")}
    _check_positive(epochs=epochs, batch_size=batch_size, lr=lr(1) if callable(lr) else lr, **rates)
    check_whole(**{name: value for name, value in others.items() if name not in rates})
    if elbo is not None:
        _check_objects(elbo, torch.optim.Adam)
    if isinstance(elbo, WakeSleep_ELBO) and elbo.phi != "wake":
        raise ValueError(f"Expected an elbo that needs no dreams, which are no datum's; got phi={elbo.phi!r}")


def _e_step(local: LocalGuide, batch: Batch, elbo: Any, optimizer: Any, steps: int, lr: float) -> None:
    """Steps in the local parameters of a minibatch, theta fixed."""
    (group,) = optimizer.param_groups
    group["lr"] = lr
    for _ in range(steps):
        optimizer.zero_grad()
        elbo.differentiable_loss(local.model, local.guide, **batch).backward(inputs=group["params"])
        optimizer.step()


def fit_guide(
    program: LatentModel,
    data: Any,
    *,
    steps: int = 500,
    lr: float = 0.05,
    elbo: ELBO | None = None,
    batch_size: int = 1000,
    seed: int | None = None,
    progress: bool = True,
) -> LocalGuide:
    """A guide for each of these data, the model left as it is: the E-step of `variational_em` alone, to its end.

    It serves for data that training has not seen, and for models that were trained without a guide, as by `mcmc_em`:
    `evaluate(fit_guide(program, test), indexed(test))`. The means begin at the likeliest of 100 draws from p(z); the
    learning rate falls geometrically to a hundredth. Of the diagonal Gaussians in unconstrained space it finds one that
    is nearest to p(z | x) in KL(q || p) among its neighbours (of several modes it holds one), up to the noise of the
    last steps, of the order of sqrt(lr / 100) of its own sigma.

    Args:
        program: a `LatentModel`; its own guide is not used.
        data: in memory, as for `LocalGuide.of`.
        steps: for each minibatch.
        lr: of Adam, at first.
        elbo: as for `fit`.
        batch_size: data at once.
        seed, progress: as for `fit`.

    Raises:
        ValueError: as `LocalGuide.of`; for bad settings.

    Example:
        >>> from pyrovae import VAE, evaluate, indexed
        >>> x = torch.ones(3, 6)
        >>> local = fit_guide(VAE.mlp(6, 2), x, steps=10, progress=False)
        >>> evaluate(local, indexed(x), num_particles=5, progress=False).log_px.shape
        torch.Size([3])
    """
    if callable(lr):
        raise ValueError("Expected lr to be a number, for it falls of itself; got a function")
    _check_settings(elbo, 1, batch_size, lr, steps=steps)
    local = LocalGuide.of(program.program if isinstance(program, LocalGuide) else program, data)
    with running(local, seed), local.sparse() as tables:
        data = prepared(local.eval(), data, "data")
        optimizer = torch.optim.SparseAdam(tables, lr=lr)
        for batch in tqdm(list(data.batches(batch_size)), desc="E-step", disable=not progress):
            local.start(batch, STARTS)
            for step in range(steps):
                _e_step(
                    local,
                    batch,
                    Trace_ELBO() if elbo is None else elbo,
                    optimizer,
                    1,
                    lr * FINAL ** (step / max(1, steps - 1)),
                )
    return local


def mcmc_em(
    program: LatentModel,
    train: Any,
    *,
    draws: int = 5,
    warmup: int = 100,
    epochs: int = 100,
    batch_size: int = 100,
    lr: Rate = 1e-3,
    seed: int | None = None,
    progress: bool = True,
) -> History:
    """Monte Carlo EM: the latents are drawn from the posterior itself, by NUTS; there is no guide.

    For each minibatch an E-step, in which the chains of its data go on from where the last epoch left them, and an
    M-step, one gradient step in theta on the mean of log p(x, z_s) over the draws z_s.

    Where it comes to rest: at maximum likelihood, whatever the posterior's shape, since
    d log p(x) / d theta = E_p(z | x)[d log p(x, z) / d theta]  (Fisher's identity). Its errors are that the chains lag
    behind theta, the less so the longer they run and the slower it moves, and the draws' noise in theta; both vanish
    with the learning rate. A chain that does not cross from one mode of its posterior to another is an error that
    stays. There is no bound to validate by: `evaluate(fit_guide(program, test), indexed(test))`
    measures log p(x) after.

    Args:
        program: a `LatentModel`; its guide is neither used nor trained.
        train: as for `variational_em`.
        draws: S, transitions of an E-step that count.
        warmup: transitions in the first epoch before them, in which the step size adapts; chains begin at p(z).
            Later it goes on adapting from one E-step to the next, so that the acceptance is 0.8.
        epochs, batch_size, lr, seed, progress: as for `fit`.

    Returns:
        A dict for each epoch: `epoch`, `seconds`, `log_joint`, the mean of log p(x, z) over its draws before their
        M-step (nats per datum; no bound on log p(x)), `step_size`, and the number of `divergences`.

    Raises:
        ValueError: for discrete latents, data or settings that do not fit, or as `LocalGuide.of`.
        FloatingPointError: where the loss is not finite.

    Source:
        Wei and Tanner (1990); Kingma and Welling (2014), appendix E, with HMC in the place of NUTS.

    Example:
        >>> from pyrovae import LinearGaussian
        >>> program, x = LinearGaussian(5, 2), torch.randn(20, 5)
        >>> history = mcmc_em(program, x, epochs=1, warmup=5, progress=False)
        >>> sorted(history[-1])
        ['divergences', 'epoch', 'log_joint', 'seconds', 'step_size']
    """
    _check_settings(None, epochs, batch_size, lr, draws=draws, warmup=warmup)
    local = LocalGuide.of(program, train)
    with running(program, seed):
        data = prepared(local.eval(), train, "train")
        chains = Chains(program, local.latents, data)
        total = 0.0

        def step(batch: Batch, epoch: int) -> Tensor:
            nonlocal total
            program.eval()
            found = chains.move(batch, warmup if epoch == 1 else 0, draws)
            program.train()
            loss = chains.loss(batch, found)
            total -= loss.item()
            return loss

        def measure() -> dict[str, float]:
            nonlocal total
            row = {"log_joint": total / len(data), "step_size": chains.step_size, "divergences": chains.divergences}
            total, chains.divergences = 0.0, 0
            return row

        return _epochs(program, _theta(program, data), data, step, measure, epochs, batch_size, lr, progress)
