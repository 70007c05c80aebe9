"""The time of one training step on labelled and unlabelled data: Pyro's ss-vae example and ours, interleaved.

    python benchmarks/label_step.py

At the settings of Pyro's example: 784-500-50, softplus, ten classes summed over, 200 unlabelled and 200 labelled
images. Pyro's example makes three steps of SVI of them: the ELBO of the unlabelled batch, that of the labelled one, and
the classification term (weight 46). Ours makes one step on the weighted sum of the three, as `fit(labeled=...)` does.
Table and timing are those of step.py.
"""

import tempfile
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
import tyro
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from step import OURS, Case, Run, Way, by_adam, each, images, joined, machine, measured, prepare, table
from step import Options as StepOptions
from torch import Tensor, nn

import pyrovae as pv
from pyrovae.labels import Label
from pyrovae.objectives import CompiledLoss, accumulate
from pyrovae.supervision import SemiSupervisedELBO

X, CLASSES, Z, HIDDEN, AUXILIARY = 784, 10, 50, 500, 46.0


@dataclass(frozen=True)
class Options(StepOptions):
    """Time of one training step on labelled and unlabelled images."""

    batch_size: int = 200
    """Unlabelled images, and labelled ones."""


class Example(nn.Module):
    """Pyro's ss-vae example: model, guide and the two of the classification term, in bare Pyro."""

    def __init__(self, program: pv.SemiSupervisedVAE):
        super().__init__()
        nets = program.classifier.net, program.posterior.net, program.likelihood.net
        self.classifier, self.encoder, self.decoder = (net.layers for net in nets)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Z), x.new_ones(Z)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(CLASSES) / CLASSES), obs=y)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(joined(y, z))).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(x)))
            mu, log_sigma = self.encoder(joined(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(mu, log_sigma.exp()).to_event(1))

    def classify(self, x: Tensor, y: Tensor) -> None:
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=AUXILIARY):
            pyro.sample("y_aux", dist.OneHotCategorical(logits=self.classifier(x)), obs=y)

    def nothing(self, x: Tensor, y: Tensor) -> None:
        pass


def by_example(program: pv.SemiSupervisedVAE, x: Tensor, x_l: Tensor, y: Tensor) -> Run:
    example, one_hot = Example(program), pv.one_hot(y, CLASSES)
    adam = pyro.optim.Adam({"lr": 1e-3})
    guide = config_enumerate(example.guide, "parallel", expand=True)
    basic = SVI(example.model, guide, adam, loss=TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False))
    auxiliary = SVI(example.classify, example.nothing, adam, loss=Trace_ELBO())
    return each(lambda: basic.step(x) + basic.step(x_l, one_hot) + auxiliary.step(x_l, one_hot))


def by_us(program: pv.SemiSupervisedVAE, x: Tensor, x_l: Tensor, y: Tensor, compile: bool) -> Run:
    elbo = SemiSupervisedELBO(Trace_ELBO(), Label("y", torch.eye(CLASSES)), nesting=1)
    scales = {"unlabeled": 1.0, "labeled": 1.0, "classes": AUXILIARY}
    arguments = {"unlabeled": {"x": x}, "labeled": {"x": x_l, "y": y}, "scales": scales}
    compiled = CompiledLoss(elbo, program.model, program.guide)

    def backward() -> float:
        if compile:
            loss, variables, grads = compiled(**arguments)
            accumulate(variables, grads)
        else:
            loss = elbo.differentiable_loss(program.model, program.guide, **arguments)
            loss.backward()
        return loss.item()

    return by_adam(program, backward)


def main(options: Options) -> None:
    """Print the table."""
    x, x_l = images(options.batch_size, options.seed), images(options.batch_size, options.seed + 1)
    y = torch.arange(options.batch_size) % CLASSES

    def build() -> pv.SemiSupervisedVAE:
        return pv.SemiSupervisedVAE.mlp(X, CLASSES, Z, (HIDDEN,))

    ways = {
        "Pyro's ss-vae example, validation on": Way(lambda: by_example(build(), x, x_l, y), validation=True),
        "Pyro's ss-vae example": Way(lambda: by_example(build(), x, x_l, y)),
        "ours, uncompiled": Way(lambda: by_us(build(), x, x_l, y, compile=False)),
        OURS: Way(lambda: by_us(build(), x, x_l, y, compile=True), compiled=1),
    }
    case = Case("m2", f"{X}-{HIDDEN}-{Z}, {CLASSES} classes", 2 * options.batch_size, ways)
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, folder)
        print(f"{machine()}\n\n{table(case, measured(case, options), options)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
