"""Imports run one way: jobs -> trainer -> {models, data}, and inside of trainer/ down, floor by floor."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "models": {"data", "trainer", "jobs", "benchmarks", "deepspeed", "ffcv"},
    "data": {"models", "trainer", "jobs", "benchmarks", "deepspeed"},
    "trainer": {"jobs", "benchmarks", "tests"},
    "jobs": {"models", "data", "benchmarks", "tests"},
}
# The door submits the very command that was typed.
ALLOWED = {"trainer/run.py": {"jobs"}}

# The floors of trainer/, from the top down. A module imports what lies below its floor, or in its own room.
FLOORS = [
    {"trainer.run"},
    {"trainer.call", "trainer.chain"},
    {"trainer.main"},
    {"trainer.evaluate"},
    {"trainer.probe", "trainer.report"},
    {"trainer.setup"},
    {"trainer.loop", "trainer.stages"},
    {"trainer.engine", "trainer.output"},
    {"trainer.config"},
    {"trainer.ranks"},
    # Settings, and what they are made of: nothing heavy.
    {"trainer.settings"},  # every room's own
    {"trainer.setup.resolution", "trainer.stages.alignment", "trainer.output.paths"},
    {"trainer.fields"},
]


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports: of `from a import b` `a.b`, where that is a module, else `a`."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file, of every module of a package."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor(module: str) -> int:
    """The number of a module's floor, from the top."""
    if module.endswith(".settings") or module == "trainer.stages":
        module = "trainer.settings"
    fits = [(len(room), i) for i, rooms in enumerate(FLOORS) for room in rooms if f"{module}.".startswith(f"{room}.")]
    assert fits, f"{module} is on no floor; give it one in FLOORS"
    return max(fits)[1]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = FORBIDDEN[package] - ALLOWED.get(str(path.relative_to(ROOT)), set())
        wrong = {name for name in imported(path) if name.split(".")[0] in forbidden}
        assert not wrong, f"{path} imports {wrong}"


def test_imports_run_down_floor_by_floor() -> None:
    known = modules("trainer")
    for module, path in known.items():
        if module == "trainer":
            continue
        room = ".".join(module.split(".")[:2])
        for other in imported(path) & known.keys() - {"trainer", module}:
            if other.startswith(f"{room}.") or other == room:
                continue
            assert floor(other) > floor(module), f"{module} imports {other}, which is not below it"


@pytest.mark.parametrize("package", ["trainer", "data", "jobs"])
def test_there_is_no_circle(package: str) -> None:
    known = modules(package)
    graph = {name: (imported(path) & known.keys()) - {name, package} for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_settings_import_nothing_heavy() -> None:
    heavy = {"torch", "deepspeed", "timm", "ffcv", "numba"}
    code = f"import sys, trainer.config, jobs.settings; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.split()
