"""The kernels of `pooled` in Triton's interpreter, on a CPU, as `interpreted.py` has those of attention.

Prints a JSON object: case -> the relative errors against torch's products in fp64; the same of compiled ones.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from models.kernels import pooled
from models.operators import Shape, build_operator
from models.operators.core import implementation
from tests.models.kernels.interpreted import FLOATS

# cells, window, images, heads, head dimension, prefix tokens, rows and columns, dtype; patches of a block; shares
CASES = {
    "as is-fp32": (2, 3, 2, 2, 24, 1, (3, 4), "fp32", 32, 1),
    "absent cells-fp32": (4, 1, 1, 2, 16, 5, (5, 6), "fp32", 32, 1),
    "patches in blocks-fp32": (2, 1, 1, 1, 80, 0, (7, 5), "fp32", 4, 1),
    "keys in blocks-fp32": (9, 1, 1, 1, 16, 1, (9, 5), "fp32", 32, 2),
    "shares-fp32": (3, 1, 1, 1, 16, 0, (5, 13), "fp32", 32, 3),
    "shares-bf16": (3, 1, 1, 2, 64, 5, (4, 17), "bf16", 4, 2),
    "many keys-bf16": (9, 1, 1, 1, 64, 1, (5, 9), "bf16", 32, 1),
    "keys in blocks-bf16": (9, 1, 1, 1, 72, 1, (5, 9), "bf16", 32, 2),
}


def outcome(case, how):
    """Output and the derivative by q, k and v."""
    cells, window, B, H, K, prefix, grid, floats, pooled.PATCHES, shares = CASES[case]
    pooled._shares = lambda heads, tokens: shares
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if how == "torch" else FLOATS[floats]
    op = build_operator("pooled", Shape(H * K, H, K, prefix), {"cells": cells, "window": window})
    shape = B, prefix + grid[0] * grid[1], 3, H, K
    packed, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(FLOATS[floats]) for _ in "xy")
    packed = (2 * packed).to(dtype).requires_grad_()
    with implementation(how):
        y = op(*packed.permute(2, 0, 3, 1, 4).unbind(0), packed[:, :, 0], grid)
        y.backward(dy[:, :, 0].transpose(1, 2).to(dtype))
    assert y.dtype == dtype
    return y, *packed.grad.unbind(2)


def compared(case):
    truth, ours = outcome(case, "torch"), outcome(case, "triton")
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, truth, strict=True)]


def as_torch_sees_it():
    """Registered as torch wants it; compiled and exported: the differences to torch's products; FLOPs."""
    generator, grid = torch.Generator().manual_seed(1), (2, 3)
    pooled.PATCHES, pooled._shares = 32, lambda heads, tokens: 2

    def drawn(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    k = drawn(1, 2, 6, 4)
    opcheck(torch.ops.unsoftmax.pool.default, (k, drawn(1, 2, 6, 4), drawn(1, 2, 4, 4), 2, *grid))
    opcheck(torch.ops.unsoftmax.far.default, (k, drawn(1, 2, 3, 4), drawn(1, 2, 3, 4), drawn(1, 2, 3)))
    op = build_operator("pooled", Shape(8, 2, 4, 1), {"cells": 2, "window": 3})
    tensors, x = [drawn(1, 2, 7, 4) for _ in range(3)], drawn(1, 7, 8)
    found = []
    for how in ("torch", "triton"):
        with implementation(how):
            y = op(*tensors, x, grid)
            found.append([y, *torch.autograd.grad((y**3).sum(), tensors)])
    with implementation("triton"):
        with FlopCounterMode(display=False) as counter:
            op(*tensors, x, grid).sum().backward()
        z = torch.compile(op, backend="aot_eager", fullgraph=True)(*tensors, x, grid)
        found.append([z, *torch.autograd.grad((z**3).sum(), tensors)])
        given = *(t.detach() for t in tensors), x.detach(), grid
        program = torch.export.export(op, given)
    graphs = [module.code for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    assert all(any(f"unsoftmax.{name}" in code for code in graphs) for name in ("pool", "far"))
    found.append([program.module()(*given)])
    errors = [((a - b).norm() / b.norm()).item() for ours in found[1:] for a, b in zip(ours, found[0], strict=False)]
    counts = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    return {"errors": errors, "flops": {name: n for name, n in counts.items() if "mm" not in name}}


def main():
    print(json.dumps({case: compared(case) for case in CASES} | {"torch": as_torch_sees_it()}))


if __name__ == "__main__":
    main()
