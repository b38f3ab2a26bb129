"""Sizes of the attention kernels, measured on this GPU: `python -m benchmarks.tune`.

For each map and each pass it builds candidates of blocks, warps and stages in several processes, checks what they give
against torch's products in fp32, and times the operator with them, in a CUDA graph. It prints the best of each beside
what `models.kernels.constants` holds. Nothing is tuned while a model runs: a better row goes into `constants` by hand.
"""

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import markdown
from models import kernels
from models.operators import Shape, build_operator
from models.operators.core import attend, implementation

OPERATORS = {"elu1": "ELU1", "focused": "FOCUSED", "hedgehog": "HEDGEHOG"}
WHOLE, SHARED = (128, 257), (8, 4097)  # images, tokens: a program has a whole head, or a share of its tokens
PASSES = {False: {"FIRST": SHARED, "SECOND": SHARED}, True: {"BOTH": WHOLE, "FIRST": SHARED, "SECOND": SHARED}}
BLOCKS, WARPS, STAGES = (32, 64, 128), (2, 4, 8), (1, 2, 3, 4)
CLOSE = 2e-2  # of bf16
H, K = 16, 64


class Candidate(NamedTuple):
    """Constants of one pass of an operator's kernels; the other pass keeps its own."""

    operator: str
    backward: bool
    passes: str
    BN: int
    num_warps: int
    num_stages: int


@contextmanager
def constants(of: Candidate) -> Iterator[None]:
    """Within it the kernels are launched with the candidate's."""
    before = kernels.constants

    def chosen(kind: str, exponent: int, K: int, dtype: torch.dtype, backward: bool, passes: str) -> dict[str, Any]:
        how = before(kind, exponent, K, dtype, backward, passes)
        if (kind, backward, passes) == (OPERATORS[of.operator], of.backward, of.passes):
            how |= {"BN": of.BN, "num_warps": of.num_warps, "num_stages": of.num_stages}
        return how

    kernels.constants = chosen
    try:
        yield
    finally:
        kernels.constants = before


class Case:
    """An operator on made tensors, and what torch's products make of the same in fp32."""

    def __init__(self, operator: str, shape: tuple[int, int], check: bool) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        like = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
        self.qkv = torch.randn(shape[0], shape[1], 3, H, K, **like).requires_grad_()
        self.direction = torch.randn(shape[0], H, shape[1], K, **like)
        self.name = type(op := build_operator(operator, Shape(H * K, H, K)).to("cuda")).__name__
        self.weights, self.numbers = op.arguments()
        self.truth = self.outcome("torch", torch.float32) if check else None

    def outcome(self, how: str, dtype: torch.dtype) -> list[Tensor]:
        """Output and gradient."""
        qkv = self.qkv.detach().to(dtype).requires_grad_()
        with implementation(how):
            out, _ = attend(self.name, *qkv.permute(2, 0, 3, 1, 4), self.weights, self.numbers)
        return [out, *torch.autograd.grad(out, qkv, self.direction.to(dtype))]

    def error(self) -> float:
        """Of the kernels, relative; the larger one of output and gradient."""
        found = zip(self.outcome("triton", torch.bfloat16), self.truth, strict=True)
        return max(((ours - truth).norm() / truth.norm()).item() for ours, truth in found)

    def call(self, backward: bool) -> Callable[[], Any]:
        """The forward pass, or the backward pass alone."""
        q, k, v = self.qkv.permute(2, 0, 3, 1, 4)
        with implementation("triton"):
            out, _ = attend(self.name, q, k, v, self.weights, self.numbers)

        def forward() -> None:
            with torch.no_grad(), implementation("triton"):
                attend(self.name, q, k, v, self.weights, self.numbers)

        return (lambda: torch.autograd.grad(out, (q, k, v), self.direction, retain_graph=True)) if backward else forward


def build(candidates: list[Candidate]) -> None:
    """Fill the compiler's cache."""
    for candidate in candidates:
        with constants(candidate):
            try:
                Case(candidate.operator, PASSES[candidate.backward][candidate.passes], check=False).call(True)()
                torch.cuda.synchronize()
            except RuntimeError as error:  # this process is of no use then; what it left out is built when it is timed
                print(f"{candidate}: {str(error).splitlines()[0]}", flush=True)
                return


def timed(candidate: Candidate, case: Case) -> float:
    """Microseconds; infinite where it does not fit into the GPU, or where its result is wrong."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench, do_bench_cudagraph

    with constants(candidate):
        try:
            error = case.error()
        except OutOfResources:
            return float("inf")
        if not error < CLOSE:
            print(f"{candidate}: WRONG, relative error {error:.3g}", flush=True)
            return float("inf")
        bench = do_bench if candidate.backward else do_bench_cudagraph
        return 1e3 * bench(case.call(candidate.backward), rep=15, return_mode="median")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, help="that pass alone; by default both")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--json", help="a file for all times")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    sides = [False, True] if args.backward is None else [args.backward]
    todo = [
        Candidate(operator, backward, passes, *how)
        for operator in args.operators
        for backward in sides
        for passes in PASSES[backward]
        for how in itertools.product(BLOCKS, WARPS, STAGES)
    ]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pool.map(build, [todo[i :: args.jobs] for i in range(args.jobs)], chunksize=1)
    rows, found = [], {}
    for key, group in itertools.groupby(todo, lambda candidate: candidate[:3]):
        operator, backward, passes = key
        case = Case(operator, PASSES[backward][passes], check=True)
        now = kernels.constants(OPERATORS[operator], 6, K, torch.bfloat16, backward, passes)
        now = Candidate(*key, now["BN"], now["num_warps"], now["num_stages"])
        times = {candidate: timed(candidate, case) for candidate in (now, *group)}
        found["-".join(map(str, key))] = sorted((us, candidate[3:]) for candidate, us in times.items())
        best = min(times, key=times.get)
        side = "backward" if backward else "forward"
        rows.append([operator, side, passes.lower(), *(f"{c[3:]!s} {times[c]:.0f}" for c in (best, now))])
        print(" | ".join(rows[-1]), flush=True)
        del case
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file)
    print(torch.cuda.get_device_name())
    print(markdown(["operator", "side", "pass", "best: (BN, warps, stages) us", "now"], rows))


if __name__ == "__main__":
    main()
