"""Softmax attention (SDPA) against linear, whole models from 224 to 2048 pixels: `make bench-resolution`.

One model a kind of attention, with random weights, resized as timm does; forward, and forward with backward. All cases
take turns, round by round, until each has had its seconds; figures are medians. On a GPU also with the batch that fills
it. With one CPU thread (OMP_NUM_THREADS=1) the process's CPU time counts, so that the machine may be busy.

Memory is what a pass adds to weights and gradients, which are there before: activations and what operators need. On a
CPU that is the peak of the resident set over its level before the pass (`common.Peak`), which also counts what no
allocator of torch knows of; on a GPU the peak of torch's allocator. FLOPs are counted over shapes alone; a
multiplication and an addition are two.
"""

import argparse
import copy
import itertools
import json
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Peak, claim, markdown
from models import linearize

PASSES = {"forward": False, "forward and backward": True}
FASTER = {256: 1.0, 512: 1.5, 1024: 2.5, 2048: 5.0}  # linear over softmax, at least; pixels
TARGETS = {"time": 1.1, "memory": 1.05}  # growth exponents of linear attention
LEAST_TOKENS = 1000  # exponents are fitted from here on
LONG = 60.0  # seconds of a pass that is not made again


@dataclass
class Case:
    """One kind of attention at one size; what its passes took."""

    attention: str
    size: int
    backward: bool
    batch: int
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0

    @property
    def time(self) -> float:
        """Seconds an image."""
        return statistics.median(self.seconds) / self.batch

    @property
    def memory(self) -> float:
        """Bytes an image."""
        return self.bytes / self.batch


class Bench:
    """The two models on their device, and what is asked of them."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """`name`: timm's."""
        softmax = timm.create_model(name).eval()
        assert softmax.blocks[0].attn.fused_attn, "softmax must be SDPA; unset TIMM_FUSED_ATTN"
        self.vits = {"softmax": softmax, "linear": linearize(softmax)}
        for vit in self.vits.values():
            vit.to(device, dtype)
        self.device, self.dtype = device, dtype
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if alone else time.perf_counter

    def tokens(self, size: int) -> int:
        """Tokens of an image, prefix tokens too."""
        vit = self.resized("linear", size)
        return vit.patch_embed.num_patches + vit.num_prefix_tokens

    def resized(self, attention: str, size: int) -> nn.Module:
        """The model for images of `size` pixels, every gradient allocated."""
        vit = self.vits[attention]
        vit.set_input_size((size, size))
        for p in vit.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return vit

    def flops(self, case: Case) -> float:
        """Of one image."""
        vit = copy.deepcopy(self.resized(case.attention, case.size)).to("meta")
        with FlopCounterMode(display=False) as counter:
            out = vit(torch.empty(1, 3, case.size, case.size, dtype=self.dtype, device="meta"))
            if case.backward:
                out.sum().backward()
        return counter.get_total_flops()

    def run(self, case: Case, first: bool) -> None:
        """One pass; the first measures memory too."""
        vit = self.resized(case.attention, case.size)
        images = torch.randn(case.batch, 3, case.size, case.size, device=self.device, dtype=self.dtype)
        peak = Peak(self.device) if first else None
        self.wait()
        began = self.clock()
        if case.backward:
            vit(images).sum().backward()
        else:
            with torch.inference_mode():
                vit(images)
        self.wait()
        case.seconds.append(self.clock() - began)
        if peak is not None:
            case.bytes = peak()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def filling_batch(self, attention: str, size: int, backward: bool, most: int) -> int:
        """The largest power of two of images that the device holds, up to `most`."""
        batch = 1
        while batch < most:
            try:
                self.run(Case(attention, size, backward, 2 * batch), first=False)
            except torch.OutOfMemoryError:
                break
            finally:
                torch.cuda.empty_cache()
            batch *= 2
        return batch


def exponent(tokens: list[int], values: list[float]) -> float:
    """The slope of log(values) over log(tokens), by least squares."""
    return statistics.linear_regression([math.log(n) for n in tokens], [math.log(v) for v in values]).slope


def measure(bench: Bench, cases: list[Case], seconds: float, rounds: int) -> None:
    """Passes of all cases in turn, a case until its seconds are over or `rounds` are done.

    The first pass measures memory, which slows it on a CPU; its time counts only where it took so long that there is no
    other and that this does not matter.
    """
    for i in range(rounds + 1):
        for case in cases:
            if i == 0 or (case.seconds[0] < LONG and sum(case.seconds[1:]) < seconds):
                bench.run(case, first=i == 0)
    for case in cases:
        case.seconds = case.seconds[1:] or case.seconds


def report(bench: Bench, cases: list[Case], sizes: list[int]) -> str:
    """The tables and the exponents."""
    found = {(case.attention, case.size, case.backward): case for case in cases}
    tokens = [bench.tokens(size) for size in sizes]
    said = []
    for title, backward in PASSES.items():
        rows = []
        for size, count in zip(sizes, tokens, strict=True):
            softmax, linear = (found[attention, size, backward] for attention in bench.vits)
            batches = f"{softmax.batch}, {linear.batch}" if softmax.batch != linear.batch else f"{linear.batch}"
            flops = [bench.flops(case) / 1e9 for case in (softmax, linear)]
            rows.append([
                f"{size}", f"{count:,}", batches, *(f"{x:,.1f}" for x in flops),
                *(f"{1 / case.time:.3g}" for case in (softmax, linear)), f"{softmax.time / linear.time:.2f}",
                *(f"{case.memory / 2**20:,.0f}" for case in (softmax, linear)), f"{linear.memory / softmax.memory:.2f}",
                f"{len(softmax.seconds)}, {len(linear.seconds)}",
            ])  # fmt: skip
        said.append(f"{title}\n\n{markdown(COLUMNS, rows)}")
        chosen = [(size, count) for size, count in zip(sizes, tokens, strict=True) if count > LEAST_TOKENS]
        if len(chosen) < 2:
            continue
        counts = [count for _, count in chosen]
        for attention in bench.vits:
            these = [found[attention, size, backward] for size, _ in chosen]
            grown = {
                "time": exponent(counts, [c.time for c in these]),
                "memory": exponent(counts, [c.memory for c in these]),
            }
            words = [f"{what} N^{x:.3f}" for what, x in grown.items()]
            if attention == "linear":
                words = [
                    f"{word} ({'at most' if grown[what] <= most else 'MISSED:'} {most})"
                    for word, (what, most) in zip(words, TARGETS.items(), strict=True)
                ]
            said.append(f"{attention}, {counts[0]:,} to {counts[-1]:,} tokens: {', '.join(words)}")
        said.append("")
    return "\n".join(said)


def claims(bench: Bench, cases: list[Case], sizes: list[int], model: str) -> list[dict[str, Any]]:
    """The rows of `benchmarks.all`."""
    found = {(case.attention, case.size, case.backward): case for case in cases}
    rows = []
    for title, backward in PASSES.items():
        for size in sizes:
            softmax, linear = (1 / found[attention, size, backward].time for attention in bench.vits)
            words = f"{model}, {size} pixels, {title}: linear over softmax"
            rows.append(claim(words, linear, FASTER.get(size), "images/s", peer=softmax, at_least=True))
    return rows


COLUMNS = ["pixels", "tokens", "batch", "GFLOPs softmax", "linear", "images/s softmax", "linear", "linear / softmax",
           "MiB an image softmax", "linear", "linear / softmax", "passes"]  # fmt: skip


def main() -> None:
    """Measure and print."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="vit_large_patch16_224" if cuda else "vit_small_patch16_224", help="timm's name"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1024, 2048], help="pixels")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", choices=("bfloat16", "float32"))
    parser.add_argument("--seconds", type=float, default=10, help="of a case; at least one pass")
    parser.add_argument("--rounds", type=int, default=9, help="passes of a case at most")
    parser.add_argument("--most", type=int, default=1024, help="images of the batch that fills a GPU, at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables; batch 1")
    options = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    torch.manual_seed(0)
    began = time.monotonic()
    bench = Bench(options.model, device, getattr(torch, options.dtype))
    for attention in bench.vits:  # what libraries keep once they have run is no case's
        bench.run(Case(attention, options.sizes[0], True, 1), first=False)
    combinations = list(itertools.product(options.sizes, PASSES.values(), bench.vits))
    batches = {"batch 1": lambda *_: 1}
    if cuda and not options.json:
        batches["the batch that fills the GPU"] = lambda *case: bench.filling_batch(*case, options.most)
    where = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU thread(s)"
    if not options.json:
        print(f"{options.model}, {options.dtype}, {where}, torch {torch.__version__}\n")
    for name, batch_of in batches.items():
        cases = [Case(a, size, backward, batch_of(a, size, backward)) for size, backward, a in combinations]
        measure(bench, cases, options.seconds, options.rounds)
        if options.json:
            print(json.dumps({"rows": claims(bench, cases, options.sizes, options.model)}))
            return
        print(f"{name}, {report(bench, cases, options.sizes)}", flush=True)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
