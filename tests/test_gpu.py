"""On a GPU: the same figures as on the CPU, within what noise allows."""

import pytest
import torch
import zoo

from pyrovae import LinearGaussian, compare, evaluate, fit, load, save
from pyrovae.conditionals import DiagonalNormal

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("entry", zoo.PROGRAMS.values(), ids=zoo.PROGRAMS)
def test_every_program_trains_and_is_evaluated_as_on_the_cpu(entry, tmp_path):
    program, data = entry.make(), entry.batch(64)
    fit(program, data, data, epochs=2, device="cuda", seed=0, progress=False)
    assert {p.device.type for p in program.parameters()} == {"cuda"}
    there = evaluate(program, data, 2000, seed=0, progress=False)
    save(program, tmp_path / "weights")
    here = evaluate(load(tmp_path / "weights"), data, 2000, seed=1, progress=False)
    error = (there.standard_error**2 + here.standard_error**2).sqrt() + 1e-4
    assert ((there.log_px - here.log_px).abs() < 5 * error).all(), "seeds 0 and 1"


def test_exact_value_and_comparison():
    program = LinearGaussian(6, 2, DiagonalNormal.mlp(6, 2, ())).cuda()
    x = program.sample(50)
    assert x.device.type == "cuda"
    result = evaluate(program, x, 5000, seed=0, progress=False)
    assert result.log_px.device.type == "cpu"
    comparison = compare(program, x, (1, 100), seed=0, progress=False)
    assert comparison.difference < 1e-4


def test_resumes_on_the_gpu_to_the_same_weights(tmp_path):
    x = zoo.PROGRAMS["VAE DiagonalNormal Bernoulli"].data(64)
    options = {"batch_size": 16, "device": "cuda", "seed": 0, "progress": False}
    weights = []
    for epochs in ((4,), (2, 4)):
        torch.manual_seed(1)
        for i, until in enumerate(epochs):
            program = zoo.PROGRAMS["VAE DiagonalNormal Bernoulli"].make()
            fit(program, x, x, epochs=until, run_dir=tmp_path / str(len(epochs)), resume=i > 0, **options)
        weights.append(torch.cat([p.flatten() for p in program.parameters()]))
    assert torch.equal(*weights)
