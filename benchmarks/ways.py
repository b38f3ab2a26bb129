"""Eager or compiled, and how q, k and v lie in memory, on a CPU: `OMP_NUM_THREADS=1 python -m benchmarks.ways`.

A linearised ViT computes a batch forward, and forward and backward, in three ways that take turns; figures are
medians of CPU time. Parted: q, k and v are copied out of the projection's output, each by itself, as `models` does on a
CPU. Strided: they stay where they are, and each product of matrices copies what it needs. Compiled: block by block, as
`train.compile` does; its start is the CPU time of the first pass over the median, from an empty cache. Compiled code
gets them parted in any case.
"""

import argparse
import importlib
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from benchmarks.common import markdown
from models import linearize

PASSES = {"forward": False, "forward and backward": True}
WAYS = (("eager", "parted"), ("eager", "strided"), ("compiled", "parted"))
linear_attention = importlib.import_module("models.linear_attention")  # of which `models` has the function by that name


def strided(qkv_BN3HK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `parted`, without its copies."""
    q, k, v = qkv_BN3HK.unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


LAYOUT = {"parted": linear_attention.parted, "strided": strided}


@contextmanager
def laid_out(layout: str) -> Iterator[None]:
    """Within it attention takes q, k and v so."""
    linear_attention.parted = LAYOUT[layout]
    try:
        yield
    finally:
        linear_attention.parted = LAYOUT["parted"]


def cpu_seconds() -> float:
    """Of this process and of the compilers that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def passed(vit: nn.Module, images: Tensor, backward: bool) -> float:
    """CPU seconds of a pass."""
    began = cpu_seconds()
    with torch.set_grad_enabled(backward):
        out = vit(images).sum()
        if backward:
            out.backward()
    return cpu_seconds() - began


def rows(model: str, operator: str, size: int, dtype: torch.dtype, batch: int, turns: int) -> list[list[str]]:
    """The lines of the table of an operator at `size` pixels."""
    torch.manual_seed(0)
    vits = {how: linearize(timm.create_model(model, img_size=size).eval(), operator).to(dtype) for how, _ in WAYS}
    for block in vits["compiled"].blocks:
        block.compile()
    images = torch.randn(batch, 3, size, size, dtype=dtype)
    seconds: dict[tuple, list[float]] = {(way, backward): [] for backward in PASSES.values() for way in WAYS}
    with fresh_cache():
        for _ in range(turns + 1):
            for ((how, layout), backward), took in seconds.items():
                with laid_out(layout):
                    took.append(passed(vits[how], images, backward))
    torch.compiler.reset()
    lines = []
    for words, backward in PASSES.items():
        medians = [statistics.median(seconds[way, backward][1:]) for way in WAYS]
        start = seconds[WAYS[2], backward][0] - medians[2]
        saved = medians[0] - medians[2]
        pays = f"{batch * start / saved:,.0f}" if saved > 0 else "never"
        lines.append([operator, f"{size}", words, *(f"{1e3 * x / batch:.1f}" for x in medians), f"{start:.1f}", pays])
    return lines


HEAD = ["operator", "pixels", "pass", "eager, parted", "eager, strided", "compiled", "start of compiled, s",
        "pays after images"]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm's name")
    parser.add_argument("--operators", nargs="+", default=["elu1", "focused"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512], help="pixels")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # so that the compilers' time is this process's
    print(f"{options.model}, {options.dtype}, batch {options.batch}; CPU ms an image\n")
    print(markdown(HEAD, []), end="")
    for operator in options.operators:
        for size in options.sizes:
            lines = rows(options.model, operator, size, getattr(torch, options.dtype), options.batch, options.rounds)
            print("".join("| " + " | ".join(line) + " |\n" for line in lines), end="", flush=True)


if __name__ == "__main__":
    main()
