"""The fused kernels against the formula in fp64, in Triton's interpreter; built for GPUs that need not be here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import kernels
from models.operators.core import implementation, implementation_of

pytest.importorskip("triton", reason="this torch comes without Triton")
ROOT = Path(__file__).parents[3]


def said(*command: str) -> dict:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_forward_and_backward_are_the_formula():
    for case, found in said("tests.models.kernels.interpreted").items():
        # bf16 keeps 8 bits; a softmax of products of two roundings loses some more.
        limit = 1e-6 if "fp32" in case else 2e-2
        assert max(found["errors"]) < limit, (case, found)
        assert found["deterministic"], case
        if case.startswith(("elu1-257", "focused-257")):
            forward, both = found["bytes"]
            assert 1 < forward < 1.3 and 1 < both < 1.6, (case, found)


@pytest.mark.parametrize("capability", [80, 90])
def test_builds_ahead_of_time(capability):
    how = f"--json --maps ELU1 HEDGEHOG --head_dims 64 --sizes --windows --cells --for {capability}"
    found = said("benchmarks.kernels", *how.split())
    assert len(found) == 10
    for name, built in found.items():
        assert 16 <= built["registers"] <= 255, name
        assert 0 < built["shared"] <= (163 if capability == 80 else 227) * 1024, name


def test_what_the_kernels_do_not_serve_torch_does():
    q = torch.randn(1, 2, 5, 8)
    with implementation("triton"):
        assert implementation_of("Elu1", q, q, q) == "triton"
        assert implementation_of("PolaFormer", q, q, q) == "torch"
        assert implementation_of("Elu1", *[q.double()] * 3) == "torch"
        assert implementation_of("Elu1", *[q.half()] * 3) == "torch"
        wide = torch.randn(1, 1, 5, 256)
        assert implementation_of("Elu1", wide, wide, wide) == "torch"
    assert implementation_of("Elu1", q, q, q) == "torch"
    with pytest.raises(ValueError, match="choose one of reference, torch, triton"), implementation("cuda"):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("images, tokens", [(2, 300), (200, 130)], ids=["in shares", "whole heads"])
@pytest.mark.parametrize("kind", sorted(set(kernels.MAPS.values())))
def test_on_a_gpu(kind, images, tokens):
    name = next(name for name, of in kernels.MAPS.items() if of == kind)
    from models.operators.core import attend

    weights = {"HEDGEHOG": [torch.randn(3, 64, 64, device="cuda") / 8 for _ in "qk"]}.get(kind, [])
    numbers = [6.0] if kind == "FOCUSED" else []
    found = {}
    for how, dtype in (("reference", torch.float64), ("triton", torch.bfloat16)):
        torch.manual_seed(0)
        qkv = torch.randn(images, tokens, 3, 3, 64, device="cuda").bfloat16().to(dtype).requires_grad_()
        with implementation(how):
            given = [w.to(torch.float64 if how == "reference" else torch.float32) for w in weights]
            out, _ = attend(name, *qkv.permute(2, 0, 3, 1, 4).unbind(0), given, numbers)
        out.square().sum().backward()
        found[how] = out.double(), qkv.grad.double()
    for ours, truth in zip(found["triton"], found["reference"], strict=True):
        assert (ours - truth).norm() < 2e-2 * truth.norm()
