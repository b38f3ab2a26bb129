"""The kernels in Triton's interpreter, on a CPU: a process of its own, since Triton reads its environment at import.

Prints a JSON object: case -> the relative errors against the formula in fp64, the bytes moved and the least of them.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

from models import kernels
from models.operators import Shape, build_operator
from models.operators.core import implementation

B, H = 1, 2
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAPS = ("elu1", "relu", "focused", "focused_learned", "exp", "hedgehog")
# operator, tokens, head dimension, dtype, shares of a head's tokens
CASES = [
    *((name, 37, 16, "fp32", 1) for name in (*MAPS, "mala")),
    *((name, 257, 64, "bf16", 1) for name in ("elu1", "focused", "hedgehog")),
    *((name, 140, 72, "bf16", 2) for name in ("focused_learned", "exp", "hedgehog")),
    ("elu1", 70, 128, "bf16", 1),
]  # fmt: skip

moved = [0]


def counted(method, tensor):
    """`method` of the interpreter's builder, which adds up what is not masked."""

    def call(self, ptrs, *args):
        mask = args[tensor].data if tensor is not None else None
        moved[0] += int(mask.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return method(self, ptrs, *args)

    return call


builder = interpreter.InterpreterBuilder
builder.create_masked_load = counted(builder.create_masked_load, 0)
builder.create_masked_store = counted(builder.create_masked_store, 1)


def outcome(name, how, x, dtype, weights):
    """[output, dq dk dv, derivatives of the parameters] of an operator, and the bytes of forward and of both."""
    N, K = x.shape[1], x.shape[-1]
    op = build_operator(name, Shape(H * K, H, K, 1)).to(torch.float64 if how == "reference" else torch.float32)
    op.load_state_dict(weights)
    x = x.to(torch.float64 if how == "reference" else dtype, copy=True).requires_grad_()
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)  # strides of a packed projection
    moved[0] = 0
    with implementation(how):
        out = op(q, k, v, q, (0, 0))
    forward = moved[0]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * direction.to(dtype)).sum().backward()
    assert out.shape == (B, H, N, K)
    return [out, x.grad, *(p.grad for p in op.parameters())], forward, moved[0]


def main():
    found = {}
    for name, N, K, floats, shares in CASES:
        kernels._shares = lambda heads, tokens, shares=shares: shares
        generator, dtype = torch.Generator().manual_seed(0), FLOATS[floats]
        x = torch.randn(B, N, 3, H, K, generator=generator, dtype=torch.float64).to(dtype)
        op = build_operator(name, Shape(H * K, H, K, 1))
        weights = {key: p + 0.1 * torch.randn(p.shape, generator=generator) for key, p in op.state_dict().items()}
        truth, _, _ = outcome(name, "reference", x, dtype, weights)
        ours, forward, both = outcome(name, "triton", x, dtype, weights)
        again, _, _ = outcome(name, "triton", x, dtype, weights)
        q = x[:, :, 0].transpose(1, 2)
        found[f"{name}-{N}-{K}-{floats}-{shares}"] = {
            "errors": [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, truth, strict=True)],
            "deterministic": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
            "bytes": [forward / kernels.moved_bytes(q, False), both / kernels.moved_bytes(q, True)],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
