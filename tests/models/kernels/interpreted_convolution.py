"""The convolution's kernels in Triton's interpreter, on a CPU, as `interpreted.py` has those of attention.

Prints a JSON object: case -> the relative errors against torch's convolution in fp64, the bytes asked for by the least.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from models.kernels import convolution
from models.operators import Shape, build_additions
from models.operators.core import implementation
from tests.models.kernels.interpreted import FLOATS, moved

FLOATS["fp16"] = torch.float16
# size, heads, head dimension, prefix tokens, rows and columns, dtype, layout, programs at least, their channels, rows
CASES = {
    "value_conv5-packed-fp32": (5, 2, 24, 1, (3, 4), "fp32", "packed", 1, 32, 2),
    "local_conv5-contiguous-bf16": (5, 1, 80, 3, (3, 9), "bf16", "contiguous", 64, 128, 2),
    "local_conv3-apart-fp32": (3, 2, 88, 0, (5, 3), "fp32", "apart", 1, 256, 4),
    "value_conv3-packed-fp16": (3, 1, 96, 2, (1, 9), "fp16", "packed", 8, 128, 1),
    "value_conv5-packed-bf16-8": (5, 1, 64, 1, (8, 8), "bf16", "packed", 1, 64, 4),
}


def laid(x_BNHK, how):
    """[B, H, N, K] in one of three layouts; the channels of the last do not lie side by side."""
    if how == "packed":
        return torch.stack([x_BNHK] * 3, 2)[:, :, 1].transpose(1, 2)
    x = x_BNHK.transpose(1, 2).contiguous()
    return x if how == "contiguous" else x.transpose(-2, -1).contiguous().transpose(-2, -1)


def outcome(name, how, given, dtype):
    """[output, derivatives by the weight, v and what the operator gave], bytes of forward and of both."""
    _, H, K, prefix, grid, _, layout, *_ = CASES[name]
    addition = name.partition("-")[0]
    add = build_additions([addition], Shape(H * K, H, K, prefix))[addition]
    add.weight = torch.nn.Parameter(given[-1].to(torch.float64 if how == "torch" else torch.float32))
    v, out, dy = (laid(x.to(torch.float64 if how == "torch" else dtype), layout) for x in given[:3])
    leaves = [v.requires_grad_()] if add.site == "values" else [out.requires_grad_(), v.requires_grad_()]
    moved[0] = 0
    with implementation(how):
        y = add(*leaves, None, grid)
    forward = moved[0]
    y.backward(dy)
    return [y, *(x.grad for x in (add.weight, *leaves))], forward, moved[0]


def compared(name):
    size, H, K, prefix, grid, floats, _, programs, channels, rows = CASES[name]
    convolution.PROGRAMS, convolution.CHANNELS, convolution.ROWS = programs, channels, {size: rows}
    generator, dtype = torch.Generator().manual_seed(0), FLOATS[floats]
    shape = (1 if grid[0] == 8 else 2, prefix + grid[0] * grid[1], H, K)
    given = [torch.randn(s, generator=generator).to(dtype) for s in (*[shape] * 3, (H * K, 1, size, size))]
    truth, _, _ = outcome(name, "torch", given, dtype)
    ours, forward, both = outcome(name, "triton", given, dtype)
    assert ours[0].dtype == dtype and ours[0].transpose(1, 2).is_contiguous()
    least = [convolution.moved_bytes(given[0], name.startswith("local"), backward) for backward in (False, True)]
    return {
        "errors": [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, truth, strict=True)],
        "bytes": [forward / least[0], both / least[1]],
    }


def as_torch_sees_it():
    """Registered as torch wants it; compiled, exported, differentiated twice: the largest difference to torch's."""
    convolution.PROGRAMS, convolution.CHANNELS, convolution.ROWS = 1, 16, {3: 1}
    generator, grid = torch.Generator().manual_seed(1), (2, 3)
    v, out = (torch.randn(1, 2, 7, 4, generator=generator).requires_grad_() for _ in range(2))
    taps = torch.randn(9, 8, generator=generator).requires_grad_()
    opcheck(torch.ops.unsoftmax.convolution.default, (v, out, taps, False, True, 1, *grid))
    opcheck(torch.ops.unsoftmax.convolution_taps.default, (v, out, 3, 1, *grid))
    add = build_additions(["value_conv3"], Shape(8, 2, 4, 1))["value_conv3"]
    add.weight = torch.nn.Parameter(torch.randn(8, 1, 3, 3, generator=generator))
    flops, found = [], []
    for how in ("torch", "triton"):
        with implementation(how):
            with FlopCounterMode(display=False) as counter:
                y = add(v, None, grid)
            flops.append(counter.get_total_flops())
            (first,) = torch.autograd.grad((y**3).sum(), v, create_graph=True)
            found.append([y, first, *torch.autograd.grad(first.square().sum(), (v, add.weight))])
    with implementation("triton"):
        z = torch.compile(add, backend="aot_eager", fullgraph=True)(v, None, grid)
        found.append([z, *torch.autograd.grad((z**3).sum(), v)])
        program = torch.export.export(add, (v.detach(), None, grid))
    assert "unsoftmax.convolution" in program.graph_module.code
    found.append([program.module()(v.detach(), None, grid)])
    errors = [((a - b).norm() / b.norm()).item() for ours in found[1:] for a, b in zip(ours, found[0], strict=False)]
    return {"errors": errors, "flops": flops}


def main():
    print(json.dumps({name: compared(name) for name in CASES} | {"torch": as_torch_sees_it()}))


if __name__ == "__main__":
    main()
