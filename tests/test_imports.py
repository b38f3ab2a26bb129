"""Imports run one way: jobs -> trainer -> {models, data}; the loop knows no stage."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "models": {"data", "trainer", "jobs", "benchmarks", "deepspeed", "ffcv"},
    "data": {"models", "trainer", "jobs", "benchmarks", "deepspeed"},
    "trainer": {"jobs", "benchmarks", "tests"},
    "jobs": {"models", "data", "benchmarks", "tests"},
}
# It submits the very command that was typed.
ALLOWED = {"trainer/run.py": {"jobs"}}


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = FORBIDDEN[package] - ALLOWED.get(str(path.relative_to(ROOT)), set())
        wrong = {name for name in imported(path) if name.split(".")[0] in forbidden}
        assert not wrong, f"{path} imports {wrong}"


def test_the_loop_knows_no_stage() -> None:
    assert not {
        name
        for name in imported(ROOT / "trainer/loop.py")
        if name.startswith(("trainer.stages", "trainer.setup.build"))
    }
