"""Linear layers that are solved for in closed form: against scikit-learn, on every family, and what stays as it is."""

import copy

import pytest
import timm
import torch
from sklearn.linear_model import Ridge
from timm.models.vision_transformer import ResPostBlock
from torch.nn import functional as F

from models import linearize, refit, taps
from models.refit import RIDGE
from tests.models.test_families import FAMILIES, TINY, build

def images(batches: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(batches, 8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


def calm(name: str) -> torch.nn.Module:
    """A ViT of random weights whose residual stream does not explode."""
    vit = build(name)
    with torch.no_grad():
        for weight in vit.parameters():
            weight.mul_(0.5)
    return vit


@torch.no_grad()
def lost(student: torch.nn.Module, teacher: torch.nn.Module, seen: list[torch.Tensor]) -> float:
    """Mean squared error of the last block's output."""
    last = f"blocks.{len(teacher.blocks) - 1}.rc2"
    errors = []
    for x in seen:
        with taps(student, [last]) as mine, taps(teacher, [last]) as theirs:
            student.forward_features(x), teacher.forward_features(x)
        errors.append(F.mse_loss(mine[last], theirs[last]).item())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_comes_nearer(name: str) -> None:
    teacher = calm(name)
    student = linearize(teacher, "hedgehog", additions=["value_conv3"]).train()
    before, teacher_was = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    far = lost(copy.deepcopy(student).eval(), teacher, images(2, seed=1))
    assert refit(student, teacher, images(24)) == 4
    assert student.training and not teacher.training
    near = lost(student.eval(), teacher, images(2, seed=1))  # of images that were not seen
    assert near < 0.98 * far
    after = student.state_dict()
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in teacher_was.items())
    assert list(after) == list(before)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed <= {key for key in after if ".attn.proj." in key or ".mlp.fc2." in key}
    assert {key for key in changed if key.endswith("weight")} == {
        f"blocks.{i}.{path}.weight" for i in range(2) for path in ("attn.proj", "mlp.fc2")
    }


@pytest.mark.parametrize("prefix_weight", (1.0, 9.0))
def test_it_is_ridge_regression(prefix_weight: float) -> None:
    teacher = build("vit_small_patch14_reg4_dinov2.lvd142m")
    student = linearize(teacher).requires_grad_(False)
    proj, seen = student.blocks[0].attn.proj.requires_grad_(True), images(3)
    names = ["blocks.0.heads", "blocks.0.rc1"]
    with torch.no_grad(), taps(student, names) as mine, taps(teacher, names) as theirs:
        student.forward_features(torch.cat(seen)), teacher.forward_features(torch.cat(seen))
    x = mine[names[0]].flatten(0, 1).double()
    y = (theirs[names[1]] - mine[names[1]]).flatten(0, 1).double() / teacher.blocks[0].ls1.gamma.detach()
    weights = torch.ones(len(seen) * 8, 21, dtype=torch.double)
    weights[:, :5] = prefix_weight
    weights = weights.flatten()
    mean = (weights @ x) / weights.sum()
    variance = (weights @ (x - mean).square() / weights.sum()).mean()
    ridge = Ridge(alpha=(RIDGE * variance * weights.sum()).item()).fit(x, y, sample_weight=weights)
    weight, bias = proj.weight.detach().clone(), proj.bias.detach().clone()
    assert refit(student, teacher, seen, prefix_weight=prefix_weight) == 1
    torch.testing.assert_close(proj.weight - weight, torch.from_numpy(ridge.coef_).float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(proj.bias - bias, torch.from_numpy(ridge.intercept_).float(), rtol=0, atol=1e-3)
    assert (proj.weight - weight).abs().max() > 0.01


def test_what_lacks_nothing_stays_as_it_is() -> None:
    teacher = calm("vit_small_patch14_dinov2.lvd142m")
    student = linearize(teacher, keep_softmax=[0])
    before = copy.deepcopy(student.state_dict())
    refit(student, teacher, images(4))
    same = {key for key, value in student.state_dict().items() if torch.equal(value, before[key])}
    assert {key for key in before if not key.startswith("blocks.1.")} <= same  # block 0 is the teacher's own
    assert not {"blocks.1.attn.proj.weight", "blocks.1.mlp.fc2.weight"} & same


def test_frozen_layers_and_those_before_a_norm_are_left() -> None:
    teacher = calm("vit_small_patch14_dinov2.lvd142m")
    student = linearize(teacher)
    student.blocks[1].mlp.requires_grad_(False)
    before = student.blocks[1].mlp.fc2.weight.clone()
    assert refit(student, teacher, images(4)) == 3
    assert torch.equal(student.blocks[1].mlp.fc2.weight, before)
    after = timm.create_model("vit_tiny_patch16_224", **TINY, block_fn=ResPostBlock).eval()
    assert refit(linearize(after), after, images(1)) == 0


def test_a_silent_channel_is_left() -> None:
    teacher = calm("vit_small_patch14_dinov2.lvd142m")
    with torch.no_grad():
        teacher.blocks[0].ls2.gamma[7] = 0.0
    student = linearize(teacher)
    before = student.blocks[0].mlp.fc2.weight.clone()
    refit(student, teacher, images(4))
    assert torch.equal(student.blocks[0].mlp.fc2.weight[7], before[7])
    assert all(p.isfinite().all() for p in student.parameters())


def test_processes_add_up_what_they_saw() -> None:
    teacher, seen = calm("vit_small_patch14_dinov2.lvd142m"), images(4)
    student = linearize(teacher)
    whole, doubled = copy.deepcopy(student), copy.deepcopy(student)
    refit(whole, teacher, seen)
    refit(doubled, teacher, seen, add_up=lambda sums: sums.mul_(2))  # another process with the same images
    for one, other in zip(whole.parameters(), doubled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.equal(whole.blocks[0].attn.proj.weight, student.blocks[0].attn.proj.weight)


def test_blocks_that_are_compiled_or_recompute() -> None:
    teacher = calm("vit_small_patch16_dinov3.lvd1689m")
    plain = linearize(teacher)
    other = copy.deepcopy(plain)
    refit(plain, teacher, images(2))
    other.set_grad_checkpointing(True)
    for block in other.blocks:
        block.compile()
    refit(other, teacher, images(2))
    assert all(map(torch.equal, plain.parameters(), other.parameters()))
