"""Fused neighborhood attention against torch's products in fp64, in Triton's interpreter; built for absent GPUs."""

import pytest
import torch

from models.kernels import neighborhood
from models.operators import Shape, build_additions
from models.operators.core import implementation
from tests.models.kernels.test_kernels import said

pytest.importorskip("triton", reason="this torch comes without Triton")


def test_forward_and_backward_are_those_of_torch():
    found = said("tests.models.kernels.interpreted_neighborhood")
    as_torch_sees_it = found.pop("torch")
    assert max(as_torch_sees_it["errors"]) < 1e-5, as_torch_sees_it
    # Forward and backward of 6 patches in 2 heads of 4: two products per place of a window, and four.
    assert sorted(as_torch_sees_it["flops"]) == [2 * 2 * 6 * 4 * (2 * 9 + 1), 2 * 2 * 6 * 4 * (4 * 9 + 3)]
    for case, of in found.items():
        assert max(of["errors"]) < (1e-5 if "fp32" in case else 2e-2), (case, of)
        forward, both = of["bytes"]  # a window's keys are asked for at each of its places; caches hold them
        most = 5.5 if case.startswith("pooled") else 4  # known keys too, and what the kernels of cells ask for
        assert 1 < forward < most and 1 < both < most, (case, of)


@pytest.mark.parametrize("capability", [80, 90])
def test_builds_ahead_of_time(capability):
    how = f"--json --maps --sizes --windows 3 --cells --head_dims 64 --for {capability}"
    found = said("benchmarks.kernels", *how.split())
    assert len(found) == 6
    for name, built in found.items():
        assert 16 <= built["registers"] <= 255 and built["spills"] <= 16, (name, built)


def test_what_the_kernels_do_not_serve_torch_does():
    q = torch.randn(1, 2, 4, 8)
    assert neighborhood.serves(q, q, q.bfloat16(), q.half())
    assert not neighborhood.serves(q, q, q.double(), q)
    wide = torch.randn(1, 1, 4, 256)
    assert not neighborhood.serves(wide, wide, wide, wide)
    add = build_additions(["neighborhood3"], Shape(16, 2, 8))["neighborhood3"].double()
    x = torch.randn(1, 4, 16).double()
    with implementation("triton"):
        ours = add(*[q.double()] * 4, x, (2, 2))
    assert torch.equal(ours, add(*[q.double()] * 4, x, (2, 2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["neighborhood3", "neighborhood5"])
@pytest.mark.parametrize("K", [64, 80])
def test_on_a_gpu(name, K):
    found = {}
    for run, how, dtype in ((0, "torch", torch.float64), (1, "triton", torch.bfloat16), (2, "triton", torch.bfloat16)):
        torch.manual_seed(0)
        add = build_additions([name], Shape(3 * K, 3, K, 5))[name].to("cuda", torch.float64)
        add.far.weight.data.normal_(std=0.02)
        add.to(dtype if how == "torch" else torch.float32)
        given = torch.randn(4, 5 + 15 * 17, 4, 3, K, device="cuda").bfloat16().to(dtype).requires_grad_()
        x = torch.randn(4, 5 + 15 * 17, 3 * K, device="cuda").to(add.far.weight.dtype)
        with implementation(how):
            y = add(*given.permute(2, 0, 3, 1, 4).unbind(0), x, (15, 17))
        y.square().sum().backward()
        found[run] = y.double(), given.grad.double(), add.far.weight.grad.double()
    for truth, ours, again in zip(*found.values(), strict=True):
        assert (ours - truth).norm() < 2e-2 * truth.norm()
        assert torch.equal(ours, again)
