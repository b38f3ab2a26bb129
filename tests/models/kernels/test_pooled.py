"""The kernels of `pooled` against torch in fp64, in Triton's interpreter; built for GPUs that need not be here."""

import pytest
import torch

from models.kernels import pooled
from models.operators import Shape, build_operator
from models.operators.core import implementation
from tests.models.kernels.test_kernels import said

pytest.importorskip("triton", reason="this torch comes without Triton")


def test_forward_and_backward_are_those_of_torch():
    found = said("tests.models.kernels.interpreted_pooled")
    as_torch_sees_it = found.pop("torch")
    assert max(as_torch_sees_it["errors"]) < 1e-5, as_torch_sees_it
    # Of 6 patches in 2 heads of 4: logits, keys and values of cells; 4 cells and a prefix token; a window's places, and
    # the 3 x 3 cells, of 1 x 2 patches each, that it may meet.
    once = 2 * 2 * 6 * 4
    flops = {"pool": 3 * once, "far": 2 * 5 * once, "neighborhood": (2 * 9 + 9 + 1) * once}
    flops |= {f"{name}_backward": 2 * flops[name] for name in ("pool", "far")}
    assert as_torch_sees_it["flops"] == flops | {"neighborhood_backward": (4 * 9 + 9 + 9 + 3) * once}
    for case, errors in found.items():
        assert max(errors) < (1e-5 if "fp32" in case else 2e-2), (case, errors)


@pytest.mark.parametrize("capability", [80, 90])
def test_builds_ahead_of_time(capability):
    how = f"--json --maps --sizes --windows --cells 8 32 --head_dims 64 --for {capability}"
    found = said("benchmarks.kernels", *how.split())
    assert len(found) == 4 + 5
    for name, built in found.items():
        assert 16 <= built["registers"] <= 255 and built["spills"] <= 16, (name, built)


def test_what_the_kernels_do_not_serve_torch_does():
    q = torch.randn(1, 2, 4, 8)
    assert pooled.serves(q, q, q)
    assert not pooled.serves(q, q, q.bfloat16())
    assert not pooled.serves(q.double(), q.double())
    assert not pooled.serves(torch.randn(1, 1, 4, 256))
    op = build_operator("pooled", Shape(16, 2, 8), {"cells": 2})
    x = torch.randn(1, 4, 16).double()
    with implementation("triton"):
        ours = op(*[q.double()] * 3, x, (2, 2))
    assert torch.equal(ours, op(*[q.double()] * 3, x, (2, 2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cells", [1, 8, 16])
@pytest.mark.parametrize("K", [64, 80])
def test_on_a_gpu(cells, K):
    found = {}
    for run, how, dtype in ((0, "torch", torch.float64), (1, "triton", torch.bfloat16), (2, "triton", torch.bfloat16)):
        torch.manual_seed(0)
        op = build_operator("pooled", Shape(3 * K, 3, K, 5), {"cells": cells})
        given = torch.randn(4, 5 + 15 * 17, 3, 3, K, device="cuda").bfloat16().to(dtype).requires_grad_()
        with implementation(how):
            y = op(*given.permute(2, 0, 3, 1, 4).unbind(0), given[:, :, 0].flatten(2), (15, 17))
        y.square().sum().backward()
        found[run] = y.double(), given.grad.double()
    for truth, ours, again in zip(*found.values(), strict=True):
        assert (ours - truth).norm() < 2e-2 * truth.norm()
        assert torch.equal(ours, again)
