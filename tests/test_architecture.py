"""The house: imports run downwards, every public part is in the zoo and in the table of contents."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import zoo

import pyrovae
from pyrovae import LatentModel, conditionals, models
from pyrovae.traces import replayed_guide

PACKAGE = Path(pyrovae.__file__).parent
FLOORS = [
    ("sequences", "noise", "arguments", "files"),
    ("nets", "reference", "weights", "sources", "watch", "inductor", "options", "clustering", "attention", "streams"),
    ("batches",),
    ("data",),
    ("conditionals", "labels", "quadrants", "processes"),
    ("program", "em"),
    ("functions", "traces", "compiled"),
    ("survey",),
    ("models", "bounds", "schedules", "symptoms"),
    ("configuration",),
    ("checkpoint", "check", "objectives", "draws", "supervision"),
    ("evaluate", "compare", "measure"),
    ("run",),
    ("fit", "plots", "music"),
    ("recipes", "learning"),
    ("cli",),
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_downwards(path):
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "pyrovae" and parts[1] != room(path):
            assert floor(parts[1]) < floor(room(path)), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_models_never_import_each_other_and_floor_0_has_no_pyro(path):
    names = imported(path)
    if room(path) == "models":
        assert not [name for name in names if name.startswith("pyrovae.models")]
    if floor(room(path)) <= floor("data"):
        assert not [name for name in names if name.split(".")[0] == "pyro"]


@pytest.mark.parametrize("path", sorted((PACKAGE / "reference").glob("*.py")), ids=str)
def test_reference_imports_torch_and_math_alone(path):
    names = {name for name in imported(path) if not name.startswith("pyrovae.reference")}
    assert {name.split(".")[0] for name in names} <= {"math", "collections", "typing", "torch"}


def test_no_drawer():
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_files_are_small():
    long = {path.name: lines for path in FILES if (lines := path.read_text().count("\n")) > 380}
    assert not long


def public_classes(module, base):
    return {value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, base)} - {base}


def test_every_public_conditional_and_model_is_in_the_zoo():
    in_zoo = {type(make()) for make in zoo.CONDITIONALS.values()} | {
        type(e.make()) for e in (zoo.PROGRAMS | zoo.LABELED).values()
    }
    missing = (public_classes(conditionals, conditionals.Conditional) | public_classes(models, LatentModel)) - in_zoo
    assert not missing, f"add to tests/zoo.py: {missing}"


def test_every_model_is_in_the_table_of_contents():
    missing = {c.__name__ for c in public_classes(models, LatentModel)} - set(vars(pyrovae))
    assert not missing, f"add to pyrovae/__init__.py: {missing}"


def test_every_program_of_the_zoo_has_its_reference():
    for name, entry in (zoo.PROGRAMS | zoo.LABELED).items():
        program = entry.make()
        batch = entry.batch(2)
        _, latents = replayed_guide(program, batch)
        assert program.reference_elbo(**batch, **latents) is not None, f"{name}: write its function in reference/"


def test_init_is_a_table_of_contents():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert all(isinstance(node, ast.Expr | ast.ImportFrom) for node in tree.body)


def test_importing_changes_no_global_setting():
    code = """
import torch, pyro, random, numpy
from pyro.distributions.util import is_validation_enabled
seen = lambda: (torch.get_default_dtype(), is_validation_enabled(), torch.is_grad_enabled(), torch.get_num_threads(),
                torch.initial_seed(), torch.get_rng_state().sum().item(), random.getstate(),
                str(numpy.random.get_state()),
                torch.distributions.Distribution._validate_args, torch.get_float32_matmul_precision())
torch.manual_seed(1)
before = seen()
import pyrovae
assert seen() == before
import sys
assert not {"matplotlib", "sklearn", "lightning_fabric", "pooch", "tyro"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
