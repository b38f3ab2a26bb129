"""What `--dry_run` says and counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import models
from benchmarks.common import Peak
from tests.conftest import ENVIRONMENT, ROOT
from trainer.config import parse, stage_of
from trainer.engine.engine import DeepSpeedZeroConfig
from trainer.main import main
from trainer.setup.dry_run import measure, memory_bytes, model_state_bytes


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
            "FLOPs per step",
            "memory per rank",
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
    stage = stage_of(settings)(settings, models.linearize(teacher), teacher, 0, {})
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

    def at_most(zero: int, activations: float, accumulate: int, within: int = 1) -> float:
        config = DeepSpeedZeroConfig(stage=zero, max_live_parameters=1, zero_hpz_partition_size=within)
        return memory_bytes(10**9, 0, 0, config, 10, True, False, activations, accumulate) / 1e9

    assert at_most(1, 5e9, 1) == pytest.approx(2 + 1.2 + 1 + 5)
    assert at_most(1, 5e9, 2) == pytest.approx(2 + 1.2 + 1 + 2 + 5)  # those of the first micro-batch
    assert at_most(1, 1e9, 1) == pytest.approx(2 + 1.2 + 1 + 2 + 0.4)  # the update, which takes a share in fp32
    assert at_most(2, 5e9, 2) == pytest.approx(2 + 1.2 + 1 + 0.4 + 5)  # in fp32
    assert at_most(3, 5e9, 1) == pytest.approx(0.2 + 1.2 + 1 + 0.2 + 5)
    assert at_most(3, 5e9, 1, within=5) == pytest.approx(0.2 + 1.2 + 1 + 0.2 + 5 + 0.4)  # bf16 once more per node of 5


if __name__ == "__main__":
    print(json.dumps([counted_and_taken(checkpointing) for checkpointing in ("false", "true")]))
