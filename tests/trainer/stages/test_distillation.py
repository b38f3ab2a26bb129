"""Stage 3 learns the logits of a softmax model that was fine-tuned before."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import models
from data import train_loader
from tests.conftest import run_trainer
from tests.trainer.stages.test_base import job_of
from trainer.config import UserError, parse


@pytest.fixture(scope="module")
def master(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the softmax baseline."""
    done = run_trainer(small, tmp_path_factory.mktemp("master"), 3, "--student.attention", "softmax")
    assert done.code == 0, done.err
    return done.folder / "export"


def test_the_loss_is_cross_entropy_and_the_logits(small: Path, master: Path) -> None:
    batch = next(iter(train_loader(small / "train.beton", image_size=32, batch_size=16).epoch()))
    options = ["--stage3.distill", str(master), "--stage3.distill_weight", "0.25", "--stage3.distill_temperature", "2"]
    stage = job_of(small, 3, *options).stage.train()
    values = stage(batch)
    with torch.no_grad():
        ours, theirs = (
            stage.student.forward_head(stage.student.forward_features(batch["image"])),
            models.load(master)(batch["image"]),
        )
    p, q = (theirs / 2).softmax(-1), (ours / 2).softmax(-1)
    distillation = 4 * (p * (p / q).log()).sum(-1).mean()
    cross_entropy = F.cross_entropy(ours, batch["label"])
    torch.testing.assert_close(values["distillation"].detach(), distillation, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["loss"].detach(), 0.75 * cross_entropy + 0.25 * distillation)
    values["loss"].backward()
    assert not any("master" in name for name, _ in stage.named_parameters())


def test_a_run_that_distils_exports_the_student_alone(small: Path, master: Path, tmp_path: Path) -> None:
    options = ["--stage3.distill", str(master), "--stage3.mixup", "0.8", "--train.bf16", "true"]
    options += ["--data.resolutions", "['16:0.5']"]
    dry = run_trainer(small, tmp_path, 3, *options, "--dry_run")
    assert dry.code == 0 and "of the teacher" in dry.out, dry.err
    done = run_trainer(small, tmp_path, 3, *options, ranks=2)
    assert done.code == 0, done.err
    assert {"cross_entropy", "distillation"} <= done.lines("train")[-1].keys()
    exported = load_file(done.folder / "export/model.safetensors")
    assert exported.keys() == load_file(master / "model.safetensors").keys()


def test_what_does_not_fit_is_refused(small: Path, master: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage3\.distill .*has 4 classes, the student's head 5"):
        job_of(small, 3, "--stage3.distill", str(master), "--stage3.num_classes", "5")
    with pytest.raises(UserError, match=r"stage3\.distill .*input\.mean"):
        job_of(small, 3, "--stage3.distill", str(master), "--data.mean", "[0.1, 0.1, 0.1]")
    config = {key: value for key, value in models.read_config(master).items() if key not in ("digest", "format")}
    config["input"] |= {"mean": [0.1, 0.1, 0.1]}
    models.save(other := tmp_path / "other", load_file(master / "model.safetensors"), config)
    with pytest.raises(UserError, match=r"stage3\.distill .*input\.mean is \[0\.1, 0\.1, 0\.1\], this run's is"):
        job_of(small, 3, "--stage3.distill", str(other))
    with pytest.raises(FileNotFoundError, match="no export there"):
        job_of(small, 3, "--stage3.distill", str(tmp_path))
    with pytest.raises(UserError, match=r"stage3\.distill .*segmentation"):
        parse(["--stage", "3", "--task", "segmentation", "--stage3.distill", str(master)])
