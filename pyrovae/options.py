"""What the command line can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro


@dataclass(frozen=True)
class Train:
    """Train a latent-variable model, then draw its pictures and measure its log-likelihood on the test data."""

    model: Literal[
        "vae",
        "auxiliary",
        "hierarchical",
        "conditional",
        "draw",
        "m2",
        "mixture-vae",
        "mixture",
        "linear-gaussian",
        "deep-markov",
        "linear-state-space",
        "hidden-markov",
    ] = "vae"
    """hierarchical: several layers of latents; conditional: p(x | c); draw: images painted in glimpses; m2: a label
    that some data have; mixture-vae: latents in clusters; mixture: of Gaussians; auxiliary: one more latent in the
    guide; linear-gaussian. Of sequences: deep-markov, linear-state-space, hidden-markov."""
    data: str = "digits"
    """digits, mnist, fashion-mnist, binarized-mnist, frey-faces, jsb-chorales, or a .npy or .npz file (all of it
    in memory)."""
    binarize: Literal["auto", "none", "dynamic", "static", "threshold"] = "auto"
    """How grey values become binary; auto: dynamic for a bernoulli likelihood, unless the data are binary already."""
    posterior: Literal["diagonal", "full", "iaf", "planar", "householder", "spline"] = "diagonal"
    """Family of q(z | x): a Gaussian of diagonal or full covariance, or a flow."""
    prior: Literal["standard", "mixture", "vamp", "real-nvp", "maf", "autoregressive"] = "standard"
    """Family of p(z)."""
    bound: Literal["elbo", "iwae", "dreg", "stl"] = "elbo"
    """What is maximised; iwae and dreg: the bound of --draws draws, with either gradient; stl: sticking the landing."""
    draws: int = 5
    """Draws for each datum in training, where --bound is not elbo."""
    kl_warmup: int = 0
    """Epochs over which the weight of the KL term rises from 0 to 1."""
    free_bits: tuple[float, int] | None = None
    """Nats that the KL of each of so many groups of latents costs nothing below."""
    likelihood: Literal["bernoulli", "unit-normal", "normal", "floor-normal", "continuous", "logistics"] = "bernoulli"
    """Family of p(x | z); continuous: Bernoulli on [0, 1]; logistics: of values k / 255."""
    layers: tuple[int, ...] = (20, 10)
    """hierarchical: sizes of z1, z2, ...; each has the hidden layers of --hidden."""
    guide: Literal["bottom-up", "top-down", "ladder"] = "bottom-up"
    """hierarchical: the order in which the guide draws the layers."""
    given: Literal["class", "top-left", "top-right", "bottom-left", "bottom-right"] = "class"
    """conditional: c, the class of a datum or a quadrant of its image."""
    glimpses: int = 10
    """draw: how many, each with a latent of --z-dim."""
    units: int = 256
    """draw: of each LSTM."""
    read_size: int = 2
    """draw: filters of a row and of a column of the grid that reads."""
    write_size: int = 5
    """draw: of the grid that writes."""
    clusters: int = 10
    """mixture, mixture-vae: how many."""
    covariance: Literal["diagonal", "full"] = "diagonal"
    """mixture, mixture-vae: of each cluster."""
    pretrain: int = 50
    """mixture-vae: epochs of a VAE, in whose latents the clusters begin."""
    rnn: int = 200
    """deep-markov: units of the guide's recurrent network."""
    states: int = 10
    """hidden-markov: how many."""
    labels: int = 100
    """m2: how many training data keep their label, equally many of each class."""
    supervised_weight: float | None = None
    """m2: weight of the classification term; by default 0.1 times the number of training data."""
    z_dim: int = 20
    """Number of latents."""
    hidden: tuple[int, ...] = (200, 200)
    """Units of the hidden layers, from x to z; the decoder has them in reverse."""
    epochs: int = 300
    """Passes over the training data."""
    batch_size: int = 100
    """Data in a minibatch."""
    lr: float = 1e-3
    """Learning rate of Adam, in the first epoch."""
    lr_final: float | None = None
    """In the last epoch, and geometrically between; by default the same throughout."""
    weight_decay: float = 0.0
    """Of Adam: this times each weight is added to its gradient."""
    patience: int | None = 50
    """Stop after so many epochs without a better ELBO on the validation data."""
    grad_clip: float | None = None
    """Largest norm of a minibatch's gradient."""
    seed: int = 0
    """Of initial weights, binarization, minibatches and noise."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    devices: int | None = None
    """Processes that share each minibatch, each on a device of its own; by default those that torchrun has started."""
    num_nodes: int = 1
    """Machines, with so many --devices each; torchrun starts the command on every one."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed: networks in bfloat16."""
    compile: bool = False
    """Compile training and evaluation: takes a minute at first, and pays from some minutes of training on."""
    num_particles: int = 5000
    """K of the importance-sampled log-likelihood at the end."""
    out: Path | None = None
    """Folder for everything that is written; by default runs/<data>-<date and time>."""
    resume: bool = False
    """Go on with the run in --out, with its own settings; --epochs may be raised."""


@dataclass(frozen=True)
class Evaluate:
    """Importance-sampled log-likelihood of a run's test data; writes evaluation.json."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    num_particles: int = 5000
    """K."""
    part: Literal["train", "val", "test"] = "test"
    """Which part of the data."""
    seed: int = 0
    """Of the draws."""
    devices: int | None = None
    """Processes that share the data; by default those that torchrun has started."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed: networks in bfloat16."""
    compile: bool = False
    """Compile the program: pays from thousands of data on."""


@dataclass(frozen=True)
class Compare:
    """Reference ELBO, Trace_ELBO and importance-sampled bounds side by side; writes bounds.png."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    num_particles: tuple[int, ...] = (1, 10, 100, 1000, 5000)
    """Every K."""
    num_data: int = 1000
    """At most so many data, evenly spread over the part."""
    part: Literal["train", "val", "test"] = "test"
    """Which part of the data."""
    seed: int = 0
    """Of the draws."""


@dataclass(frozen=True)
class Sample:
    """Draw from a trained program; writes samples.png and, on request, the values."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    n: int = 64
    """How many; in the picture of clusters or classes there is a row for each, and as many columns."""
    seed: int = 0
    """Of the draws."""
    npy: Path | None = None
    """Also write n draws of x, (n, D), to this .npy file."""


def stored_options(stored: dict[str, Any]) -> Train:
    """The options of a run, as JSON has them.

    Raises:
        TypeError: for an unknown option, or a value of another type than the option's.

    Example:
        >>> stored_options({"epochs": 7, "hidden": [20]}).hidden
        (20,)
    """
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
    }
    hints = get_type_hints(Train)
    wrong = [f"{name}={value!r}" for name, value in options.items() if name in hints and not _fits(value, hints[name])]
    if wrong:
        raise TypeError(", ".join(wrong))
    return Train(**options)


def _fits(value: Any, hint: Any) -> bool:
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        return value in kinds
    if get_origin(hint) is tuple:
        kinds = kinds[:1] * len(value) if isinstance(value, tuple) and kinds[-1] is ... else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kinds:
        return any(_fits(value, kind) for kind in kinds)
    return isinstance(value, int | float if hint is float else hint) and (hint is bool or not isinstance(value, bool))
