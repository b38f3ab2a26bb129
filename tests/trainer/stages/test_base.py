"""Teacher, student and targets of a stage, in one process."""

from pathlib import Path

import pytest
import torch

import models
from data import eval_loader, train_loader
from trainer.config import parse
from trainer.ranks.world import this_process
from trainer.setup.build import build


def job_of(small: Path, stage: int, *options: str):
    settings = parse(
        ["--config", str(small / "recipe.yaml"), "--stage", str(stage), "--run", str(small / "none"), *options]
    )
    return build(settings, this_process())


@pytest.fixture(scope="module")
def batches(small: Path) -> list[dict]:
    loader = train_loader(small / "train.beton", image_size=32, batch_size=16)
    return list(loader.epoch())[:4]


def test_factors_and_weights_that_reach_nothing_are_told(small: Path) -> None:
    def told(*options: str) -> list[str]:
        return [note for note in job_of(small, 2, *options).notes if "changes nothing" in note]

    assert told() == told("--train.lr_attention", "3", "--stage2.blocks", "[0]", "--stage2.block_weight", "2") == []
    assert told("--train.lr_new", "10") == ["train.lr_new 10: changes nothing, no such parameter trains"]
    assert told("--train.lr_new", "10", "--student.additions", "[gate]") == []
    assert told("--stage2.block_weight", "7") == ["stage2.block_weight 7: changes nothing without stage2.blocks"]


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


def test_host_memory_is_held_once_a_machine(small: Path) -> None:
    stage = job_of(small, 2).stage
    file, maps = small / "teacher.safetensors", Path("/proc/self/maps").read_text().splitlines()
    mapped = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if line.endswith(str(file))]
    assert all(any(a <= p.data_ptr() < b for a, b in mapped) for p in stage.teacher.parameters())
    assert not any(a <= p.data_ptr() < b for a, b in mapped for p in stage.student.parameters())
    assert stage.frozen == {}  # until the rank that writes the export asks for it
    stage.keep_frozen()
    assert stage.frozen.keys() == {name for name, p in stage.student.named_parameters() if not p.requires_grad}


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


def test_a_new_head_starts_alike_on_all_ranks(small: Path) -> None:
    heads = [job_of(small, 3, "--stage3.reset_head", "true").stage.student.head.weight for _ in range(2)]
    assert torch.equal(*heads)
