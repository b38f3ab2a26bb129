"""Guards of numbers: the losses of 20 steps of each stage of the embedded default, per operator.

A change that should alter no number leaves them as they are. CONTRIBUTING says when and how to write them again:
`python -m tests.trainer.test_golden_losses`.
"""

import json
import tempfile
from pathlib import Path

import pytest

from models import OPERATORS
from tests.conftest import write_small, zygote
from tests.support.zygote import Run

FILE = Path(__file__).parent / "golden_losses.json"
STAGES = {"1": [], "2": [], "3": [], "3 segmentation": ["--task", "segmentation"]}
STEPS = 20
TOLERANCE = 1e-3  # relative; another processor's kernels round differently, and 20 steps add that up


def losses(operator: str, stage: str, small: Path, run: Path) -> list[float]:
    """The training loss of each step of 16 images, in fp32, on one rank."""
    argv = ["--stage", stage[0], *STAGES[stage], "--run", str(run), "--student.operator", operator]
    argv += ["--train.steps", str(STEPS), "--train.log_every", "1", "--train.bf16", "false", "--tracking", "[]"]
    argv += ["--train.batch_size", "16", "--train.eval_first", "false", "--data.val", "null"]
    with tempfile.TemporaryDirectory() as log:
        forked = Run(zygote(small / "train.beton"), argv, Path(log))
        assert forked.wait(400) == 0, forked.text("err")
    lines = map(json.loads, (run / f"stage{stage[0]}/metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


def chain(operator: str, small: Path, folder: Path) -> dict[str, list[float]]:
    """The stages after each other, as one would run them; segmentation after stage 2, as classification is."""
    found = {stage: losses(operator, stage, small, folder / "run") for stage in ("1", "2", "3")}
    (folder / "run/stage3").rename(folder / "classification")
    return found | {"3 segmentation": losses(operator, "3 segmentation", small, folder / "run")}


@pytest.mark.slow
@pytest.mark.parametrize("operator", json.loads(FILE.read_text()))
def test_losses_are_as_they_were(operator: str, small: Path, tmp_path: Path) -> None:
    pinned, found = json.loads(FILE.read_text())[operator], chain(operator, small, tmp_path)
    for stage, expected in pinned.items():
        assert found[stage] == pytest.approx(expected, rel=TOLERANCE), stage


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        (small := Path(folder) / "small").mkdir()
        write_small(small)
        written = {operator: chain(operator, small, Path(folder) / operator) for operator in OPERATORS}
    FILE.write_text(json.dumps(written, indent=1) + "\n")
