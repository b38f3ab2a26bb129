"""Mixup, cutmix and drop path by sample: the same draws anywhere, timm's distributions and values."""

import numpy as np
import pytest
import torch
from timm.layers import DropPath as TimmDropPath
from timm.models import VisionTransformer
from torch.nn import functional as F

from data.augment import sample_keys, uniform
from trainer.stages.finetune.stage import set_drop_path
from trainer.stages.keyed import _LAMBDA, _LEFT, _SWITCH, _TOP, DropPath, Mixup, draw_paths, uniforms


def keys_of(count: int, seed: int = 3, epoch: int = 2) -> torch.Tensor:
    return torch.from_numpy(sample_keys(seed, epoch, np.arange(count)).view(np.int64))


def test_uniforms_are_those_of_the_views() -> None:
    for draw in (0, 1, 40, 64, 2**40):
        theirs = [uniform(3, 2, index, draw) for index in range(200)]
        assert uniforms(keys_of(200), draw).tolist() == theirs


@pytest.mark.parametrize(("mixup", "cutmix"), ((0.8, 1.0), (0.2, 0.0), (0.0, 0.5)))
def test_mixing_follows_timms_formulas(mixup: float, cutmix: float) -> None:
    from scipy.special import betaincinv

    height, width = 24, 32
    key, image = keys_of(64), torch.randn(64, 3, height, width)
    mixed, share, partner = Mixup(mixup, cutmix)(image, key)
    assert partner.tolist() == [i ^ 1 for i in range(64)]
    boxes = 0
    for i in range(64):
        first = key[i - i % 2][None]
        switch, drawn, top, left = (uniforms(first, n).item() for n in (_SWITCH, _LAMBDA, _TOP, _LEFT))
        cut = cutmix > 0 and (mixup == 0 or switch < 0.5)
        lam = betaincinv(*[cutmix if cut else mixup] * 2, drawn)
        if not cut:
            assert share[i].item() == pytest.approx(lam, abs=1e-3)
            torch.testing.assert_close(mixed[i], image[i] * lam + image[i ^ 1] * (1 - lam), rtol=0, atol=1e-2)
            continue
        # timm.data.mixup.rand_bbox and its correction of lambda.
        cut_h, cut_w = int(height * np.sqrt(1 - lam)), int(width * np.sqrt(1 - lam))
        cy, cx = int(top * height), int(left * width)
        yl, yh = np.clip([cy - cut_h // 2, cy + (cut_h + 1) // 2], 0, height)
        xl, xh = np.clip([cx - cut_w // 2, cx + (cut_w + 1) // 2], 0, width)
        expected = image[i].clone()
        expected[:, yl:yh, xl:xh] = image[i ^ 1][:, yl:yh, xl:xh]
        assert torch.equal(mixed[i], expected)
        assert share[i].item() == pytest.approx(1 - (yh - yl) * (xh - xl) / (height * width), abs=1e-6)
        boxes += 1
    assert boxes == 64 if mixup == 0 else boxes == 0 if cutmix == 0 else 10 < boxes < 54


def test_lambda_and_drops_have_the_wanted_distributions() -> None:
    key, alpha = keys_of(40_000), 0.8
    _, share, _ = Mixup(alpha, 0)(torch.zeros(40_000, 1, 1, 1), key)
    drawn = np.random.default_rng(0).beta(alpha, alpha, 20_000)
    levels = np.linspace(0.01, 0.99, 50)
    assert np.abs(np.quantile(share[0::2].numpy(), levels) - np.quantile(drawn, levels)).max() < 0.02
    path = DropPath(0.3)
    draw_paths({5: path}, key)
    assert sorted(set(path.scale.tolist())) == pytest.approx([0, 1 / 0.7])
    assert (path.scale == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


def test_a_sample_is_treated_alike_in_any_batch() -> None:
    key, image = keys_of(16), torch.randn(16, 3, 8, 8)
    mixed, share, _ = Mixup(0.8, 1.0)(image, key)
    for part in (slice(0, 2), slice(6, 12)):
        again, shares, _ = Mixup(0.8, 1.0)(image[part], key[part])
        assert torch.equal(again, mixed[part]) and torch.equal(shares, share[part])


def test_drop_path_is_timms_also_compiled_and_checkpointed() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=2).train()
    paths = set_drop_path(vit, 0.5)
    assert list(paths) == [2, 3, 4, 5]  # the first block keeps all
    assert [path.rate for path in paths.values()] == pytest.approx([0.25, 0.25, 0.5, 0.5])
    key, image = keys_of(12), torch.randn(12, 3, 8, 8)
    draw_paths(paths, key)
    assert len({tuple(path.scale.tolist()) for path in paths.values()}) == 4

    def gradients() -> list[torch.Tensor]:
        vit.zero_grad()
        F.cross_entropy(vit(image), torch.arange(12) % 2).backward()
        return [parameter.grad.clone() for parameter in vit.parameters()]

    eager = gradients()
    vit.set_grad_checkpointing(True)
    for mine, theirs in zip(gradients(), eager, strict=True):
        torch.testing.assert_close(mine, theirs)
    for block in vit.blocks:
        block.compile(backend="aot_eager")
    for mine, theirs in zip(gradients(), eager, strict=True):
        torch.testing.assert_close(mine, theirs)
    draw_paths(paths, key + 1)  # a compiled block takes the new draws
    assert not torch.allclose(gradients()[0], eager[0])

    x, path = torch.ones(4, 2, 3), paths[5]
    path.scale = torch.tensor([0.0, 2.0, 2.0, 0.0])
    kept = path(x)
    theirs = TimmDropPath(0.5).train()
    assert set(theirs(x).flatten().tolist()) <= {0.0, 2.0} and kept[:, 0, 0].tolist() == [0, 2, 2, 0]
    assert torch.equal(path.eval()(x), x)
