"""Draws from the posterior of each datum, by NUTS."""

import math
from functools import partial
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer.mcmc import NUTS
from torch import Tensor
from tqdm import tqdm

from pyrovae.arguments import check_whole
from pyrovae.batches import Batch, Data
from pyrovae.labels import without
from pyrovae.learning.local import Latent, LocalGuide, log_joint, prepared, running
from pyrovae.program import LatentModel
from pyrovae.traces import sample_sites

STEP_SIZE = 0.1  # from which the first adaptation begins
ACCEPTED, GAIN = 0.8, 0.5  # Pyro's target of the acceptance probability; step in log step size towards it


class Chains:
    """A Markov chain for each datum, in unconstrained space; those of a minibatch move together, by NUTS.

    Args:
        program: the caller has entered its scope.
        latents: of its model.
        data: numbered; chains begin at draws from p(z).
    """

    def __init__(self, program: LatentModel, latents: list[Latent], data: Data):
        self.program, self.latents = program, latents
        self.step_size, self.divergences = STEP_SIZE, 0
        with torch.no_grad():
            batch = without("index", next(data.batches(len(data))))
            sites = sample_sites(poutine.trace(program.model).get_trace(**batch))
        self.u = {each.name: each.unconstrained(sites[each.name]["value"]) for each in latents}

    def _log_joint(self, batch: Batch, u: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """log p(x, z) `(N,)` and log |det dz/du|, summed `()`."""
        values, volumes = zip(*(each.constrained(u[each.name]) for each in self.latents), strict=True)
        names = [each.name for each in self.latents]
        return log_joint(self.program, batch, dict(zip(names, values, strict=True))), torch.stack(volumes).sum()

    def _potential(self, batch: Batch, u: dict[str, Tensor]) -> Tensor:
        log_p, volume = self._log_joint(batch, u)
        return -(log_p.sum() + volume)

    def move(self, batch: Batch, warmup: int, draws: int) -> dict[str, Tensor]:
        """Unconstrained draws `(S, N, *)` of a minibatch's latents, after `warmup` in which Pyro adapts the step size.

        Without a warm-up the step size moves after the draws, to the acceptance that it should have.
        """
        index, batch = batch["index"], without("index", batch)
        step_size: Any = self.step_size  # Pyro's annotation asks for a whole number
        potential = partial(self._potential, batch)
        kernel = NUTS(None, potential, step_size, adapt_step_size=warmup > 0, adapt_mass_matrix=False)
        u = kernel.initial_params = {name: table[index] for name, table in self.u.items()}
        if not bool(torch.isfinite(value := potential(u))):
            raise FloatingPointError(f"Expected a finite log p(x, z) where the chains are; got {-value.item()}")
        kernel.setup(warmup)
        found = []
        for _ in range(warmup + draws):
            u = {name: value.detach() for name, value in kernel.sample(u).items()}
            found.append(u)
        for name, table in self.u.items():
            table[index] = u[name]
        accepted = float(kernel.logging()["acc. prob"])
        self.step_size = kernel.step_size if warmup else step_size * math.exp(GAIN * (accepted - ACCEPTED))
        self.divergences += len(kernel.diagnostics()["divergences"])
        return {name: torch.stack([each[name] for each in found[warmup:]]) for name in u}

    def loss(self, batch: Batch, draws: dict[str, Tensor]) -> Tensor:
        """-log p(x, z) summed over the minibatch, averaged over the draws, `()`."""
        size = len(next(iter(draws.values())))
        rows = {key: value.repeat(size, *[1] * (value.dim() - 1)) for key, value in without("index", batch).items()}
        return -self._log_joint(rows, {name: u.flatten(0, 1) for name, u in draws.items()})[0].sum() / size


def posterior_draws(
    program: LatentModel,
    data: Any,
    num_draws: int = 100,
    *,
    warmup: int = 100,
    batch_size: int = 100,
    seed: int | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Draws from p(z | x) of each datum by NUTS, the model left as it is: the E-step of `mcmc_em` alone.

    A minibatch's latents are one state of one chain, which begins at p(z); its step size adapts during the warm-up,
    its mass matrix is the identity in unconstrained space. Draws of one datum that follow each other are correlated.

    Args:
        program: a `LatentModel`; its guide is not used.
        data: in memory, as for `LocalGuide.of`.
        num_draws: S, after the warm-up.
        warmup: transitions that are thrown away.
        batch_size: data whose latents move together.
        seed, progress: as for `fit`.

    Returns:
        For each latent site its values `(S, N, D)`.

    Raises:
        ValueError: for discrete latents, or as `LocalGuide.of`.

    Source:
        Hoffman and Gelman (2014), as Pyro has it.

    Example:
        >>> from pyrovae import LinearGaussian
        >>> posterior_draws(LinearGaussian(5, 2), torch.zeros(3, 5), 4, warmup=5, progress=False)["z"].shape
        torch.Size([4, 3, 2])
    """
    check_whole(num_draws=num_draws, warmup=warmup, batch_size=batch_size)
    local = LocalGuide.of(program, data)
    with running(program, seed):
        data = prepared(local.eval(), data, "data")
        chains = Chains(program, local.latents, data)
        bar = tqdm(list(data.batches(batch_size)), desc="NUTS", disable=not progress)
        parts = [chains.move(batch, warmup, num_draws) for batch in bar]
        u = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
        return {each.name: torch.stack([each.constrained(draw)[0] for draw in u[each.name]]) for each in local.latents}
