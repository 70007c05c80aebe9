"""The README's Python runs and prints what the README shows; its commands are those that exist."""

import contextlib
import io
import re
from pathlib import Path

import pyrovae
from pyrovae.cli import Train

README = Path(pyrovae.__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_python_runs_and_prints_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        namespace = {}
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), namespace)
    names = re.compile(r"[^\d\s.,=%±+-]+")
    lines = [names.findall(line) for line in printed.getvalue().splitlines()]
    shown = [names.findall(line) for block in blocks("text")[:1] for line in block.splitlines()]
    assert lines == shown, "the same lines, up to the digits of another machine"


def test_two_commands_do_all_the_set_up():
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("pip install")]
    assert commands == [
        "pip install -c constraints.txt . && pyrovae train",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


def test_every_option_that_is_named_exists():
    options = {name.replace("_", "-") for name in Train.__dataclass_fields__}
    used = [word for block in blocks("bash") for line in block.splitlines() if "pyrovae train" in line
            for word in re.findall(r"--([\w-]+)", line)]  # fmt: skip
    assert set(used) <= options


def test_every_link_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_every_test_that_is_named_exists():
    file, named = "", re.findall(r"`(tests/\w+\.py)?::(test_\w+)`", README.read_text())
    assert len(named) > 10
    for found, name in named:
        file = found or file
        assert f"def {name}(" in (README.parent / file).read_text(), f"{file}::{name}"
