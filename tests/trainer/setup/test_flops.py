"""FLOPs of a step against formulas, and what is made of them."""

import copy
import json

import pytest
import timm
import torch

import models
from benchmarks.step import build_stage
from trainer.config import parse
from trainer.engine.speed import Clock, Flops, peak_flops
from trainer.evaluate.cost import counted
from trainer.setup.flops import count_flops
from trainer.stages.base import Stage

D, DEPTH, H, RATIO, SIZE, PATCH, CLASSES = 64, 3, 2, 2, 64, 8, 10
N = (SIZE // PATCH) ** 2 + 1
K = D // H
ARCHITECTURE = {
    "patch_size": PATCH, "embed_dim": D, "depth": DEPTH, "num_heads": H, "mlp_ratio": RATIO, "num_classes": CLASSES
}  # fmt: skip


def stage_of(which: str, *options: str) -> Stage:
    given = ["--stage", which, "--config", "own", "--teacher.name", "vit_tiny_patch16_224", "--teacher.kwargs"]
    given += [json.dumps(ARCHITECTURE), "--teacher.pretrained", "false", "--data.image_size", str(SIZE)]
    return build_stage(parse([*given, "--student.operator", "elu1", *options]))


def products(attention: float) -> dict[str, float]:
    """FLOPs of a forward pass by part; `attention` is that between the projections, of a block."""
    return {
        "patches": 2 * (N - 1) * 3 * PATCH**2 * D,
        "qkv": DEPTH * 2 * N * D * 3 * D,
        "attention": DEPTH * attention,
        "proj": DEPTH * 2 * N * D * D,
        "mlp": DEPTH * 2 * 2 * N * D * RATIO * D,
        "head": 2 * D * CLASSES,
    }


SOFTMAX = 2 * 2 * N * N * D  # scores, weighted sum
LINEAR = 2 * (2 * N * K * K + N * K) * H  # state, its use; the normaliser


def test_flops_are_those_of_the_formulas() -> None:
    teacher = sum(products(SOFTMAX).values())
    parts = products(LINEAR)
    found = count_flops(stage_of("2"), SIZE, torch.float32)
    assert found.teacher == teacher
    # Backward takes twice forward, without the gradient of the images; the loss reads no head. The operator's makes
    # four products of the state's size, see `models.operators.core._Attend`.
    operator = found.operator
    assert LINEAR * 2.5 * DEPTH <= operator <= LINEAR * 3.2 * DEPTH
    rest = sum(parts.values()) - parts["attention"] - parts["head"]
    assert found.student == 3 * rest - parts["patches"] + operator + parts["head"]


def test_checkpointing_does_not_count() -> None:
    assert count_flops(stage_of("2", "--train.grad_checkpointing", "true"), SIZE, torch.float32) == count_flops(
        stage_of("2"), SIZE, torch.float32
    )


def test_counting_leaves_the_stage_as_it_is() -> None:
    stage = stage_of("1")
    before = copy.deepcopy(stage.state_dict())
    found = count_flops(stage, SIZE, torch.float32)
    assert 0 < found.student < found.teacher * 2
    assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())
    assert stage.teacher.blocks[0].attn.qkv.weight.device.type == "cpu"
    assert not any(isinstance(p, torch._subclasses.FakeTensor) for p in stage.parameters())


def test_evaluations_of_other_models_count_the_same() -> None:
    """The teacher's count is torch's own of the plain model."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, **ARCHITECTURE)
    assert counted(vit, SIZE, 2, torch.float32)[0] == sum(products(SOFTMAX).values())
    assert counted(models.linearize(vit), SIZE, 2, torch.float32)[0] == sum(products(LINEAR).values())


def test_mfu_is_a_share_of_the_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", bf16=True) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", bf16=True) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", bf16=False) == 156e12
    assert peak_flops("NVIDIA L4", bf16=True) == 121e12 and peak_flops("NVIDIA L40S", bf16=True) == 362e12
    assert peak_flops("CPU", bf16=True) is None
    clock = Clock(0, torch.device("cpu"))
    values = clock.rates(10, 64, 2, Flops(1e9, 3e9, 1e8, 1e12))
    each = values["images_per_second"] / 2
    assert values["tflops"] == pytest.approx(each * 4e9 / 1e12)
    assert values["mfu"] == pytest.approx(values["mfu_teacher"] + values["mfu_student"])
    assert values["mfu_operator"] == pytest.approx(each * 1e8 / 1e12)
    assert values["seconds_per_step"] == pytest.approx(64 / values["images_per_second"])
    assert clock.rates(11, 64, 2, Flops(1, 1, 1))["mfu"] is None
