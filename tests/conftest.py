import os
from collections.abc import Iterator
from types import SimpleNamespace

import pyro
import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are small: threads only wait for each other


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """A known seed and an empty parameter store; whoever changes the default dtype has it put back."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def float64() -> None:
    torch.set_default_dtype(torch.float64)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What this machine cannot run, and slow tests unless they are asked for, are reported as deselected."""
    absent = {
        "data": not os.path.isdir(os.environ.get("PYROVAE_DATA", "")),
        "gpu": not torch.cuda.is_available(),
        "slow": not config.option.markexpr,
    }
    out = [item for item in items if any(absent[mark.name] for mark in item.iter_markers() if mark.name in absent)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def pytest_deselected(items: list[pytest.Item]) -> None:
    """One of several processes leaves the number to the first, which has the last word."""
    if items and hasattr(items[0].config, "workeroutput"):
        output: dict[str, int] = items[0].config.workeroutput
        output["deselected"] = output.get("deselected", 0) + len(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Each process has looked at all tests, and left out the same."""
    terminal = node.config.pluginmanager.get_plugin("terminalreporter")
    number = getattr(node, "workeroutput", {}).get("deselected", 0)
    terminal.stats["deselected"] = [SimpleNamespace() for _ in range(number)]  # hypothesis looks into each


def pytest_terminal_summary(terminalreporter) -> None:
    """How many faults were injected and survived, by kind."""
    counts: dict[str, int] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, found in getattr(report, "user_properties", ()):
            for kind, count in found.items() if name == "faults" else ():
                counts[kind] = counts.get(kind, 0) + count
    if counts:
        terminalreporter.write_sep("=", f"{sum(counts.values())} faults survived")
        for kind, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:6d}  {kind}")
