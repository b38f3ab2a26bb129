"""CONTRIBUTING's promise: one of each kind is one new file and one line in a table."""

import os
import shutil
import subprocess
import sys
from difflib import unified_diff
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STAGE = '''
"""Stage 4: the mean token of the student is pulled to the teacher's."""

from trainer.stages.base import Stage


class MeanToken(Stage):
    """Mean squared error of the mean tokens."""

    name, trainable, previous = "mean token", "backbone", "2"

    def losses(self, batch, outputs):
        difference = outputs.student[0].float().mean(1) - outputs.teacher["norm"].float().mean(1)
        return {"loss": difference.square().mean(-1)}
'''
OPERATOR = '''
"""Softplus, as a feature map."""

from torch.nn import functional as F

from .core import Operator, wide


class Softplus(Operator):
    """phi(x) = log(1 + e^x)."""

    @staticmethod
    def features(q, k):
        return F.softplus(wide(q)), F.softplus(wide(k))
'''
HEAD = '''
"""One convolution."""

from torch import nn

from .base import Head


class Tiny(Head):
    """A 1x1 convolution on the last block."""

    def __init__(self, width, num_classes):
        super().__init__()
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, features):
        return self.classify(features[-1])
'''
LAYOUT = """
def _pair(root: Path, split: str) -> Files:
    names = (root / "pair.txt").read_text().split()
    return Files(root, names, [0, 1], ["a", "b"], "a pair")


"""
# kind -> (new file and its text, the table's file, the line before which the new one stands, the line and its import)
KINDS = {
    "stage": ("trainer/stages/mean_token.py", STAGE, "trainer/stages/__init__.py", '    "probe": ',
              ['    "4": "trainer.stages.mean_token:MeanToken",\n']),
    "operator": ("models/operators/softplus.py", OPERATOR, "models/operators/__init__.py", '    "relu": ',
                 ['    "softplus": Softplus,\n', "from .softplus import Softplus\n"]),
    "head": ("models/heads/tiny.py", HEAD, "models/heads/__init__.py", '    "linear": ',
             ['    "tiny": ("tiny", "Tiny"),\n']),
    "recipe": ("trainer/recipes/mine.yaml", "train: {lr: 0.25}\n", None, None, []),
    "cluster": ("jobs/clusters/mine.yaml", "executor: slurm\npartition: mine\n", None, None, []),
}  # fmt: skip


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with one more of each kind."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("trainer", "models", "data", "jobs", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text, table, before, lines in KINDS.values():
        assert not (folder / path).exists()
        (folder / path).write_text(text.lstrip())
        if table is not None:
            old = (folder / table).read_text()
            assert before in old
            new = old.replace(before, lines[0] + before, 1)
            for line in lines[1:]:
                new = new.replace("from .rala import", line + "from .rala import", 1)
            (folder / table).write_text(new)
    layouts = folder / "data/layouts.py"  # a function and a line in its table
    text = layouts.read_text().replace("LAYOUTS: ", LAYOUT.lstrip() + "LAYOUTS: ", 1)
    line = '    "pair": (lambda root: (root / "pair.txt").is_file(), ("train",), _pair),\n'
    layouts.write_text(text.replace('    "cifar": ', line + '    "cifar": ', 1))
    return folder


def run(clone: Path, *command: str) -> str:
    """What a command in the copy prints."""
    env = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_and_one_line(kind: str, clone: Path) -> None:
    path, _, table, _, lines = KINDS[kind]
    assert (clone / path).is_file()
    if table is not None:
        old, new = ((of / table).read_text().splitlines() for of in (ROOT, clone))
        changes = [line for line in unified_diff(old, new, n=0, lineterm="") if line[:1] in "+-"][2:]
        assert all(line.startswith("+") for line in changes) and len(changes) == len(lines)
        entries = [line for line in changes if not line.startswith("+from ")]  # a table of classes imports them
        assert len(entries) == 1


def test_the_new_ones_work(clone: Path) -> None:
    options = ["--stage", "4", "--student.operator", "softplus", "--student.parent", "none", "--dry_run"]
    said = run(clone, "trainer/run.py", *options, "--run", str(clone / "run"))
    assert "stage 4: mean token" in said and "trainable parameters: 187,008" in said
    code = """
from pathlib import Path
import torch
from PIL import Image
from data.layouts import open_source
from jobs.settings import parse as jobs
from models import build_head
from trainer.config import parse
assert parse(["--stage", "4", "--config", "mine"]).train.lr == 0.25
requests, _ = jobs(["--cluster", "mine"])
assert list(requests) == ["1", "2", "3", "4", "probe"] and requests["4"].partition == "mine"
assert build_head("tiny", 8, 3)([torch.zeros(1, 8, 2, 2)]).shape == (1, 3, 2, 2)
(folder := Path("pair")).mkdir()
(folder / "pair.txt").write_text("0.png 1.png")
for i in range(2):
    Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
assert len(open_source(folder, None, None, None, False)) == 2
print("good")
"""
    assert run(clone, "-c", code) == "good\n"
