"""Parts of the trainer in one process: targets, the teacher's bits, the moving average, schedule, settings, dry run."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import models
from benchmarks.common import Peak
from data import eval_loader, train_loader
from tests.conftest import ENVIRONMENT, ROOT
from trainer.config import RECIPES, Train, UserError, first_difference, parse
from trainer.engine.engine import DeepSpeedZeroConfig, world
from trainer.engine.optim import AdamW, build_schedule
from trainer.main import main
from trainer.output.tracking import Tracker
from trainer.setup.build import build
from trainer.setup.dry_run import measure, memory_bytes, model_state_bytes
from trainer.stages import STAGES


def job_of(small: Path, stage: int, *options: str):
    settings = parse(
        ["--config", str(small / "recipe.yaml"), "--stage", str(stage), "--run", str(small / "none"), *options]
    )
    return build(settings, world(), Path(settings.run))


@pytest.fixture(scope="module")
def batches(small: Path) -> list[dict]:
    loader = train_loader(small / "train.beton", image_size=32, batch_size=16)
    return list(loader.epoch())[:4]


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_the_teacher_keeps_its_bits_and_its_targets(small: Path, batches: list[dict], stage: int) -> None:
    job = job_of(small, stage).stage
    before = models.fingerprint(job.teacher)
    optimizer = torch.optim.AdamW([p for p in job.parameters() if p.requires_grad], lr=1e-2)
    job.train()
    for batch in batches:
        optimizer.zero_grad()
        job(batch)["loss"].backward()
        optimizer.step()
    assert models.fingerprint(job.teacher) == before
    assert not job.teacher.training
    assert all(p.grad is None for p in job.teacher.parameters())
    assert not any("teacher" in name for name, _ in job.named_parameters())


def test_stage_1_pulls_to_the_frozen_weights_not_to_those_in_training(small: Path, batches: list[dict]) -> None:
    stage = job_of(small, 1).stage.train()
    original = models.build_backbone(
        "vit_tiny_patch16_224", parse_kwargs(small), small / "teacher.safetensors", image_size=32
    )  # a second copy, which no stage can touch
    image = batches[0]["image"]

    def by_hand() -> torch.Tensor:
        losses, x = [], original.norm_pre(original.patch_drop(original._pos_embed(original.patch_embed(image))))
        for mine, theirs in zip(stage.student.blocks, original.blocks, strict=True):
            normed = theirs.norm1(x)
            losses.append((mine.attn(normed) - theirs.attn(normed)).square().mean())
            x = theirs(x)  # the teacher's path goes on, not the student's
        return torch.stack(losses).mean()

    for _ in range(2):
        with torch.no_grad():
            expected = by_hand()
        loss = stage(batches[0])["loss"]
        torch.testing.assert_close(loss, expected)
        with torch.no_grad():  # drift: targets that came from the student's own weights would drift along
            for parameter in stage.student.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.requires_grad)


def parse_kwargs(small: Path) -> dict:
    return parse(["--config", str(small / "recipe.yaml"), "--stage", "1"]).teacher.kwargs


def test_evaluation_counts_every_image_once(small: Path) -> None:
    loaders = [
        eval_loader(small / "val.beton", image_size=32, batch_size=4, rank=rank, world_size=3) for rank in range(3)
    ]
    seen = [
        i
        for loader in loaders
        for b in loader.epoch()
        for i, v in zip(b["index"].tolist(), b["valid"].tolist(), strict=True)
        if v
    ]
    assert sorted(seen) == list(range(22))


def test_the_moving_average() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = AdamW([{"params": list(model.parameters())}], ema_decay=0.5, lr=0.1)
    expected = None
    for step in range(1, 6):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = model.weight.detach().clone() if step == 1 else expected.lerp(model.weight.detach(), 1 - decay)
    torch.testing.assert_close(optimizer.state[model.weight]["ema"], expected)


def test_the_schedule_is_a_function_of_the_step() -> None:
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": 0.5}], lr=1.0)
    schedule = build_schedule(optimizer, Train(lr=1.0, warmup_steps=10, min_lr=0.1), steps=110)

    def lr(step: int) -> float:
        schedule.step_update(step)
        return optimizer.param_groups[0]["lr"]

    assert [lr(0), lr(5), lr(10)] == pytest.approx([0, 0.25, 0.5])
    assert lr(60) == pytest.approx(0.5 * 0.55)
    assert lr(110) == pytest.approx(0.5 * 0.1)
    assert lr(5) == pytest.approx(0.25)


def test_a_recipes_stage_section_is_laid_over_the_rest_and_the_command_line_over_both(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train: {lr: 1.0, batch_size: 8}\nstages: {2: {train: {lr: 2.0}}}\n")
    lrs = [parse(["--config", str(recipe), "--stage", stage]).train.lr for stage in "123"]
    assert lrs == [1.0, 2.0, 1.0]
    settings = parse(["--config", str(recipe), "--stage", "2", "--train.lr", "3", "--local_rank=1"])
    assert (settings.train.lr, settings.train.batch_size, settings.run) == (3.0, 8, os.path.join("runs", "mine"))


def test_only_settings_that_change_what_is_learned_are_compared() -> None:
    before = {"train": {"lr": 1.0, "log_every": 1}, "teacher": {"kwargs": {"depth": 2}}}
    assert first_difference(before, {"train": {"lr": 1.0, "log_every": 5}, "teacher": {"kwargs": {"depth": 2}}}) is None
    assert "teacher.kwargs was {'depth': 2}" in first_difference(before, before | {"teacher": {"kwargs": {"depth": 3}}})


def test_dry_run_says_what_would_run_and_makes_nothing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--config", str(small / "recipe.yaml"), "--run", str(tmp_path / "run"), "--dry_run"]
    arguments += ["--stage3.mixup", "0.8", "--stage3.cutmix", "1", "--stage3.drop_path", "0.1"]
    sizes = {name: value.numel() for name, value in load_file(small / "teacher.safetensors").items()}
    qkv, head = (sum(n for name, n in sizes.items() if part in name) for part in (".attn.qkv.", "head."))
    for stage, trainable in ((1, qkv), (2, sum(sizes.values()) - head), (3, sum(sizes.values()))):
        assert main([*arguments, "--stage", str(stage)]) == 0
        said = capsys.readouterr().out
        assert f"trainable parameters: {trainable:,}" in said
        for word in (
            "starts from: the teacher's copied weights",
            "parameter groups",
            "FLOPs a step",
            "memory a rank",
            "steps: 6 of 16",
        ):
            assert word in said
    assert not (tmp_path / "run").exists()


def test_a_micro_batch_takes_what_dry_run_counts() -> None:
    """In a process of its own: memory that other tests freed would be taken again, unseen."""
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for counted, taken in json.loads(done.stdout.splitlines()[-1]):
        assert counted == pytest.approx(taken, rel=0.3)


def counted_and_taken(checkpointing: str) -> tuple[int, int]:
    """Bytes of a pass of stage 2 that takes some 100 MB: counted over shapes, and the resident set's peak."""
    torch.set_num_threads(1)
    options = ["--train.grad_checkpointing", checkpointing, "--train.bf16", "false"]
    settings = parse(["--stage", "2", *options])
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=256, depth=4, num_classes=0)
    stage = STAGES["2"](settings, models.linearize(teacher), teacher)
    _, counted = measure(stage, 256, 8, torch.float32)
    image = torch.randn(8, 3, 256, 256)
    stage({"image": image[:1]})["loss"].backward()  # what libraries keep once they have run
    peak = Peak(torch.device("cpu"))
    stage.zero_grad(set_to_none=False)
    stage({"image": image})["loss"].backward()
    return counted, peak()


def test_model_states_shrink_with_zero_stage_and_ranks() -> None:
    # 7.5 B parameters on 64 ranks: 31.4, 16.6 and 1.88 GB, figure 1 of arXiv 1910.02054.
    sizes = [model_state_bytes(7_500_000_000, 0, 0, zero, 64, bf16=True, offload=False) / 1e9 for zero in (1, 2, 3)]
    assert sizes == pytest.approx([31.4, 16.6, 1.88], rel=0.01)


def test_memory_counts_what_is_there_at_a_time() -> None:
    """1 B parameters on 10 ranks, a micro-batch of 5 GB, buffers of 1 GB: gradients come as activations go."""

    def at_most(zero: int, activations: float, accumulate: int) -> float:
        config = DeepSpeedZeroConfig(stage=zero, max_live_parameters=1)
        return memory_bytes(10**9, 0, 0, config, 10, True, False, activations, accumulate) / 1e9

    assert at_most(1, 5e9, 1) == pytest.approx(2 + 1.2 + 1 + 5)
    assert at_most(1, 5e9, 2) == pytest.approx(2 + 1.2 + 1 + 2 + 5)  # those of the first micro-batch
    assert at_most(1, 1e9, 1) == pytest.approx(2 + 1.2 + 1 + 2 + 0.4)  # the update, which takes a share in fp32
    assert at_most(2, 5e9, 2) == pytest.approx(2 + 1.2 + 1 + 0.2 + 5)
    assert at_most(3, 5e9, 1) == pytest.approx(0.2 + 1.2 + 1 + 0.2 + 5)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_parse(recipe: str) -> None:
    for stage in "123":
        if (recipe, stage) not in (("digits_teacher", "1"), ("digits_teacher", "2")):  # a stage-3 recipe
            assert Path(parse(["--config", recipe, "--stage", stage]).deepspeed).is_file()


def test_a_new_head_starts_alike_on_all_ranks(small: Path) -> None:
    heads = [job_of(small, 3, "--stage3.reset_head", "true").stage.student.head.weight for _ in range(2)]
    assert torch.equal(*heads)


def test_metrics_survive_garbage_and_say_when_they_cannot_be_written(small: Path, tmp_path: Path, capsys) -> None:
    settings = parse(["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path)])
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "split": split}) for step in (1, 2, 3) for split in ("train", "val")]
    garbage = [b"\xff\x00\xfe", b"[1]", b'"step"', b'{"step": "2"}', b"[" * 100_000, b"", b'{"loss": 1}']
    torn = [line.encode()[:9] for line in good[:1]]
    path.write_bytes(b"\n".join([*garbage, *(line.encode() for line in good), *torn]))
    tracker = Tracker(tmp_path, settings, 0, 2, 9)
    assert path.read_text().splitlines() == good[:4]
    assert tracker.judged(2) and not tracker.judged(3)
    tracker.log({"step": 3, "split": "val", "loss": float("nan"), "norm": torch.tensor(2.0)})
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3, "split": "val", "loss": None, "norm": 2.0}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))  # as on a full disk
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(file too large\)"):
            tracker.log({"step": 4, "split": "val", "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.close()
    assert not path.read_bytes().endswith(b"\n")  # the line was torn
    Tracker(tmp_path, settings, 0, 3, 9).close()
    assert path.read_text().splitlines()[:-1] == good[:4]
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 3


def test_wandb_that_fails_is_left_off(small: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path), "--wandb.enabled", "true"]
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    tracker = Tracker(tmp_path, parse(argv), 0, 0, 9)
    tracker.log({"step": 1, "split": "val", "loss": 1.0})
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
    assert capsys.readouterr().err.count("warning: wandb is left off") == 1


if __name__ == "__main__":
    print(json.dumps([counted_and_taken(checkpointing) for checkpointing in ("false", "true")]))
