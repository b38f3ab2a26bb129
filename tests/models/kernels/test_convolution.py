"""The fused convolution against torch's in fp64, in Triton's interpreter; built for GPUs that need not be here."""

import pytest
import torch

from models.kernels import convolution
from models.operators import Shape, build_additions
from models.operators.core import implementation
from tests.models.kernels.test_kernels import said

pytest.importorskip("triton", reason="this torch comes without Triton")
ROUNDING = {"fp32": 1e-6, "bf16": 2**-8, "fp16": 2**-11}  # sums are fp32: only what is written is rounded


def test_forward_and_backward_are_those_of_torch():
    found = said("tests.models.kernels.interpreted_convolution")
    as_torch_sees_it = found.pop("torch")
    assert max(as_torch_sees_it["errors"]) < 1e-6, as_torch_sees_it
    assert len(set(as_torch_sees_it["flops"])) == 1
    for case, of in found.items():
        output, by_weight, *others = of["errors"]
        assert by_weight < 1e-6, (case, of)
        assert max(output, *others) < next(ROUNDING[floats] for floats in ROUNDING if floats in case), (case, of)
    forward, both = found["value_conv5-packed-bf16-8"]["bytes"]  # with taps, and rows around strips, which caches hold
    assert 1 < forward < 2.2 and 1 < both < 2.5


def test_builds_ahead_of_time():
    found = said("benchmarks.kernels", "--json", "--maps", "--sizes", "5", "--windows", "--cells", "--head_dims", "64")
    assert len(found) == 4
    for name, built in found.items():
        assert 16 <= built["registers"] <= 255 and not built["spills"], name


def test_what_the_kernels_do_not_serve_torch_does():
    def serves(v, weight, base=None):
        return convolution.serves(v, weight, base)

    v, weight = torch.randn(1, 2, 5, 8), torch.randn(16, 1, 3, 3)
    assert serves(v, weight) and serves(v, weight, v) and serves(v.bfloat16(), weight)
    assert not serves(v.double(), weight) and not serves(v, weight, v.bfloat16())
    assert not serves(v, torch.randn(16, 1, 9, 9))
    add = build_additions(["value_conv3"], Shape(16, 2, 8, 1))["value_conv3"].double()
    with implementation("triton"):
        assert torch.equal(add(v.double(), None, (2, 2)), v.double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["value_conv3", "value_conv5", "local_conv5"])
@pytest.mark.parametrize("K", [64, 80])
def test_on_a_gpu(name, K):
    found = {}
    for run, how, dtype in ((0, "torch", torch.float64), (1, "triton", torch.bfloat16), (2, "triton", torch.bfloat16)):
        torch.manual_seed(0)
        add = build_additions([name], Shape(3 * K, 3, K, 5))[name].to("cuda", torch.float64)
        add.weight.data.normal_()
        add.to(dtype if how == "torch" else torch.float32)
        qkv = torch.randn(3, 5 + 15 * 17, 3, 3, K, device="cuda").bfloat16().to(dtype).requires_grad_()
        out, _, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        with implementation(how):
            y = add(v, None, (15, 17)) if add.site == "values" else add(out, v, None, (15, 17))
        y.square().sum().backward()
        found[run] = y.double(), qkv.grad.double(), add.weight.grad.double()
    for truth, ours, again in zip(*found.values(), strict=True):
        assert (ours - truth).norm() < 2e-2 * truth.norm()
        assert torch.equal(ours, again)
