"""README and docs: they build, their commands are those that the program has, and their error lines stand in the code.

A block of shell is parsed by the program's own parsers; a block of Python runs. `<!-- not run: WHY -->` above a block
leaves it out.
"""

import argparse
import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from PIL import Image

import models
from trainer import chain
from trainer.config import UserError, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/RESULTS.md", *sorted(ROOT.glob("docs/*.md"))]
SHELL, OTHER = ("", "sh", "bash"), ("text", "yaml")
NO_PROGRAM_OF_OURS = {"source", "cd", "git", ".venv/bin/pre-commit"}


# --- The site -------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("mkdocs")), "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "api/index.html").read_text()
    for name in ("load", "linearize", "taps", "convert", "train_loader", "Focused"):
        assert re.search(rf'id="[\w.]+\.{name}"', reference), f"{name} has no place in docs/api.md"
    assert "88.53" in (tmp_path / "operators/index.html").read_text(), "the table of recipes is not included"


# --- Blocks ---------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A fenced block: where it stands, its language, its text, and why it is not run."""

    where: str
    language: str
    text: str
    reason: str | None


def blocks() -> Iterator[Block]:
    """Those of all pages."""
    fence = re.compile(r"(?:<!--\s*not run:(.*?)-->\s*\n)?^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for page in PAGES:
        text = page.read_text()
        for found in fence.finditer(text):
            line = text.count("\n", 0, found.start(2)) + 1
            yield Block(f"{page.relative_to(ROOT)}:{line}", found[2], found[3], found[1])


BLOCKS = list(blocks())
RUN = [block for block in BLOCKS if block.reason is None]


def test_every_block_is_run_or_says_why_not() -> None:
    assert {block.where.split(":")[0] for block in BLOCKS} >= {"README.md", "docs/runs.md", "docs/students.md"}
    for block in BLOCKS:
        assert block.language in (*SHELL, *OTHER, "python"), f"{block.where}: its language is not known"
        assert block.reason is None or len(block.reason.split()) > 1, f"{block.where}: says not why it is not run"


@pytest.mark.parametrize("block", [b for b in RUN if b.language in SHELL], ids=lambda block: block.where)
def test_commands_are_understood(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for words in commands(block.text):
        check(words)


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a block, without variables that are set before them, loops and redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if set(token) <= set(";&|"):
                while words and (words[0] in ("do", "then") or re.match(r"[A-Z_]+=", words[0])):
                    words.pop(0)
                if words and words[0] not in ("for", "done"):
                    yield words
                words = []
            else:
                words.append(token)


def check(words: list[str]) -> None:
    """Raises what the program would say of a command that it does not understand."""
    name, *rest = words
    if name in NO_PROGRAM_OF_OURS:
        return
    checkers: dict[str, Callable[[list[str]], None]] = {
        "make": check_make, "python": check_python, "pip": check_pip, "deepspeed": check_deepspeed,
        "torchrun": check_torchrun, "srun": lambda rest: check_python(rest[rest.index("python") + 1 :]),
    }  # fmt: skip
    assert name in checkers, f"{name}: write `<!-- not run: WHY -->` above the block"
    checkers[name](rest)


def check_make(words: list[str]) -> None:
    """A target of the Makefile, whose ARGS its program takes."""
    target, arguments = words[0], dict(word.split("=", 1) for word in words[1:])
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
    assert rule, f"make {target}: no such target"
    module = re.search(r"-m ((?:benchmarks|tests)\.\S+) \$\(ARGS\)", rule[1])
    if "ARGS" in arguments:
        assert "$(ARGS)" in rule[1], f"make {target}: takes no ARGS"
        if module:
            check_module(module[1], shlex.split(arguments["ARGS"]))


def check_python(words: list[str]) -> None:
    """`python -m MODULE ...`, or `python trainer/run.py ...`."""
    if words[0] == "-m":
        check_module(words[1], words[2:])
    else:
        assert words[0] == "trainer/run.py"
        check_trainer(words[1:])


def check_deepspeed(words: list[str]) -> None:
    """DeepSpeed's own launcher takes what stands before the program."""
    from deepspeed.launcher.runner import parse_args

    given = parse_args(words)
    assert given.user_script == "trainer/run.py"
    check_trainer(given.user_args)


def check_torchrun(words: list[str]) -> None:
    """So does torch's."""
    from torch.distributed.run import parse_args

    given = parse_args(words)
    assert given.training_script == "trainer/run.py"
    check_trainer(given.training_script_args)


def check_pip(words: list[str]) -> None:
    """What is installed is in pyproject.toml."""
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, groups = whole["project"], whole["dependency-groups"]
    extras = project["optional-dependencies"]
    known = {*project["dependencies"], *(one for part in (*extras.values(), *groups.values()) for one in part)}
    known |= {f"{project['name']}[{extra}]" for extra in extras} | {project["name"]}
    assert words[0] == "install"
    assert set(words[1:]) <= known, f"pip install {set(words[1:]) - known}: not in pyproject.toml"


class Understood(BaseException):
    """A program's parser took its arguments; nothing else of it is to run."""


def check_module(module: str, arguments: list[str]) -> None:
    """The module's own parser takes the arguments; the module ends there."""
    module = re.sub(r"^unsoftmax\b", "models", module)
    if module == "jobs.submit":
        from jobs.settings import parse as parse_request

        requests, of_trainer = parse_request(arguments)
        for stage in requests:
            parse(["--stage", stage, *of_trainer])
        return
    found = find_spec(module)
    assert found, f"{module}: no such module"
    file = Path(found.origin).with_name("__main__.py") if found.submodule_search_locations else Path(found.origin)
    parses = re.search(r"parse_args|typed_run|write\.command", file.read_text())
    assert parses, f"{module}: takes no arguments, and would run"
    takes = argparse.ArgumentParser.parse_args

    def taken(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        takes(self, *args, **kwargs)
        raise Understood

    before, argparse.ArgumentParser.parse_args = sys.argv, taken
    sys.argv = [module, *arguments]
    try:
        with pytest.raises(Understood):
            runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv, argparse.ArgumentParser.parse_args = before, takes


def check_trainer(arguments: list[str]) -> None:
    """The trainer's settings."""
    if "--help" in arguments or "--print_config" in arguments:
        with pytest.raises(SystemExit) as end:
            parse(arguments)
        assert end.value.code == 0
    else:
        parse(chain.with_stage(arguments, "3"))  # `all` is the same settings three times


# --- The check itself: it has to be able to fail --------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["make no-such", 'make demo ARGS="--no_such 1"', "python -m data.write a.beton", "python -m no_such.module",
     "deepspeed --no_such 1 trainer/run.py --stage 1", "deepspeed trainer/run.py --stage 1 --train.no_such 1",
     "python trainer/run.py --stage all --config no_such", "pip install no-such", "mkdir runs",
     "python -m jobs.submit --no_such 1", "torchrun --no_such -- trainer/run.py --stage 1"],
)  # fmt: skip
def test_a_wrong_command_is_found(command: str) -> None:
    (words,) = commands(command)
    with pytest.raises((AssertionError, UserError, SystemExit, ImportError)):
        check(words)


# --- Python ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a photo and a run of a tiny student, as the blocks name them."""
    folder = tmp_path_factory.mktemp("desk")
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 3}
    student = models.linearize(timm.create_model("vit_tiny_patch16_224", **kwargs), "focused")
    attention = {"operator": "focused", "kwargs": {"power": 6}, "additions": [], "linear_blocks": [0, 1, 2, 3]}
    given = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
    config = {"backbone": {"name": "vit_tiny_patch16_224", "kwargs": kwargs}, "attention": attention, "input": given}
    for run in ("default/stage2", "mine/stage3", "demo/recommended/stage2"):
        export = f"runs/{run}/export"
        models.save(folder / export, student.state_dict(), config | {"lineage": {}, "classes": ["cat", "dog", "owl"]})
    Image.new("RGB", (50, 40), "teal").save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("block", [b for b in RUN if b.language == "python"], ids=lambda block: block.where)
def test_python_runs(block: Block, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.setitem(sys.modules, "unsoftmax", models)  # the wheel's name of it
    for table in (models.OPERATORS, models.ADDITIONS):
        for name in list(table):
            monkeypatch.setitem(table, name, table[name])
    known = set(models.OPERATORS)
    try:
        exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
    finally:
        for name in set(models.OPERATORS) - known:
            del models.OPERATORS[name]
        torch.set_grad_enabled(True)


# --- Error lines ----------------------------------------------------------------------------------------------------


@cache
def said() -> str:
    """All texts of the program, a line each; what is put in when it runs is …"""
    lines = []
    for path in (p for room in ("trainer", "data", "models", "jobs") for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                lines.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(" ".join(line.split()) for line in lines)


def in_the_code(line: str) -> bool:
    """Whether an error line, with … for what varies, is a text of the program, maybe put together of several."""
    parts = [part for part in line.split("…") if part.strip(" :;(.,")]
    whole = ".*".join(re.escape(part) for part in parts)
    return bool(parts) and re.search(whole, said()) is not None


def test_error_lines_stand_in_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    lines = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(lines) > 40
    unknown = [line for line in lines if not in_the_code(line)]
    assert not unknown, f"the program says no such line (any more): {unknown}"
    assert not in_the_code("train.lr …: is a colour")
