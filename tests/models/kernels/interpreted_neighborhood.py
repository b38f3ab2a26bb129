"""Neighborhood attention's kernels in Triton's interpreter, on a CPU, as `interpreted.py` has those of attention.

Prints a JSON object: case -> the relative errors against torch's products in fp64, the bytes asked for by the least.
"""

import json
import os
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models.kernels import neighborhood
from models.operators import Shape, build_additions, build_operator
from models.operators.core import implementation
from tests.models.kernels.interpreted import FLOATS, moved

# cells of `pooled`, window, heads, head dimension, prefix tokens, rows and columns, dtype, patches of a program
CASES = {
    "3-fp32": (0, 3, 2, 24, 1, (3, 4), "fp32", 16),
    "5-fp32": (0, 5, 1, 80, 0, (2, 5), "fp32", 4),
    "3-bf16": (0, 3, 2, 64, 5, (4, 17), "bf16", 16),
    "pooled-3-fp32": (2, 3, 2, 24, 1, (3, 4), "fp32", 16),
    "pooled-5-fp32": (2, 5, 1, 24, 1, (2, 9), "fp32", 16),
    "pooled-3-narrow-fp32": (4, 3, 1, 16, 1, (3, 7), "fp32", 8),
    "pooled-3-bf16": (2, 3, 1, 64, 5, (3, 17), "bf16", 16),
}


def outcome(case, how):
    """Output and derivatives by out, q, k, v, the tokens and the parameters; bytes of forward and of both."""
    cells, size, H, K, prefix, grid, floats, neighborhood.PATCHES = CASES[case]
    generator = torch.Generator().manual_seed(0)
    wide, narrow = (torch.float64,) * 2 if how == "torch" else (torch.float32, FLOATS[floats])

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    name, shape = f"neighborhood{size}", Shape(H * K, H, K, prefix)
    if cells:
        add = build_operator("pooled", shape, {"cells": cells, "window": size})
    else:
        add = build_additions([name], shape)[name].to(wide)
    for p in add.parameters():
        p.data = (0.2 * drawn(*p.shape)).to(wide)
    N = prefix + grid[0] * grid[1]
    packed = drawn(2, N, 3 if cells else 4, H, K).to(FLOATS[floats]).to(narrow).requires_grad_()
    x, dy = drawn(2, N, H * K).to(wide).requires_grad_(), drawn(2, H, N, K).to(narrow)
    moved[0] = 0
    with implementation(how):
        y = add(*packed.permute(2, 0, 3, 1, 4).unbind(0), x, grid)
    forward = moved[0]
    y.backward(dy)
    assert y.dtype == narrow
    found = [y, packed.grad, *(() if cells else (x.grad,)), *(p.grad for p in add.parameters())]
    return found, forward, moved[0]


def compared(case):
    truth, _, _ = outcome(case, "torch")
    ours, forward, both = outcome(case, "triton")
    cells, _, H, K, _, grid, floats, _ = CASES[case]
    q = torch.empty(2, H, grid[0] * grid[1], K, dtype=FLOATS[floats])
    least = [neighborhood.moved_bytes(q, backward, cells > 0) for backward in (False, True)]
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, truth, strict=True)]
    return {"errors": errors, "bytes": [forward / least[0], both / least[1]]}


def as_torch_sees_it():
    """Registered as torch wants it; compiled, made again in backward, and exported: the errors, and FLOPs."""
    generator, grid, neighborhood.PATCHES = torch.Generator().manual_seed(1), (2, 3), 16
    tensors = [torch.randn(1, 2, 6, 4, generator=generator).requires_grad_() for _ in range(4)]
    logit = torch.randn(1, 2, 6, generator=generator).requires_grad_()
    opcheck(torch.ops.unsoftmax.neighborhood.default, (*tensors, logit, None, None, 3, *grid, 1, 1))
    known = torch.randn(1, 2, 6, 4, generator=generator).requires_grad_()
    opcheck(torch.ops.unsoftmax.neighborhood.default, (*tensors, logit, known, logit.detach() - 9, 3, *grid, 1, 2))
    add = build_additions(["neighborhood3"], Shape(8, 2, 4, 1))["neighborhood3"]
    tensors = [torch.randn(1, 2, 7, 4, generator=generator).requires_grad_() for _ in range(4)]
    x = torch.randn(1, 7, 8, generator=generator)
    found = []
    for how in ("torch", "triton"):
        with implementation(how):
            y = add(*tensors, x, grid)
            found.append([y, *torch.autograd.grad((y**3).sum(), tensors)])
    with implementation("triton"):
        with FlopCounterMode(display=False) as counter:
            add(*tensors, x, grid).sum().backward()
        compiled = torch.compile(add, backend="aot_eager", fullgraph=True)
        for call in (compiled, partial(checkpoint, add, use_reentrant=False)):
            z = call(*tensors, x, grid)
            found.append([z, *torch.autograd.grad((z**3).sum(), tensors)])
        program = torch.export.export(add, (*(t.detach() for t in tensors), x, grid))
    graphs = [module.code for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    assert any("unsoftmax.neighborhood" in code for code in graphs)
    found.append([program.module()(*(t.detach() for t in tensors), x, grid)])
    errors = [((a - b).norm() / b.norm()).item() for ours in found[1:] for a, b in zip(ours, found[0], strict=False)]
    flops = [n for op, n in counter.get_flop_counts()["Global"].items() if "neighborhood" in str(op)]
    return {"errors": errors, "flops": flops}


def main():
    print(json.dumps({case: compared(case) for case in CASES} | {"torch": as_torch_sees_it()}))


if __name__ == "__main__":
    main()
