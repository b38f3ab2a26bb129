"""What the fused kernels give on a GPU: `make bench-gpu`, which writes runs/bench-gpu.md.

Attention alone: forward, and backward, of q, k, v as a packed projection gives them, against torch's flash attention,
against the same operator of torch's products, and against flash-bidirectional-linear-attention where that is installed
(`flash_bla`, whose call gets features, so that the feature map is timed with it). Forward is timed in a CUDA graph. The
share is of the time in which a copy moves the least bytes that attention needs.

The convolution of `value_conv5` and the window of `neighborhood3` alone, likewise, against torch's.

Whole models: forward in bf16, blocks compiled, in a CUDA graph, in turns: softmax (flash), linear, and the same model
whose attention returns v, which is the most that any attention can win. At one image, and at as many images as make
--tokens. Memory is the peak of one image with weights, and for training with gradients.

Figures are medians. Without a GPU all of it runs in torch's own products, which only shows that it runs.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import ROOT, Peak, markdown
from benchmarks.resolution import FASTER
from models import linearize
from models.operators import Shape, build_additions, build_operator
from models.operators.core import implementation

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16
OPERATORS = ("elu1", "focused", "focused_learned", "hedgehog", "pooled")


def wait() -> None:
    """Until the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], least: float, graph: bool = False) -> float:
    """Median of single calls, for about `least` seconds after a warm-up; `graph`: without what the host does."""
    if CUDA:
        from triton.testing import do_bench, do_bench_cudagraph

        if graph:
            return do_bench_cudagraph(call, rep=1e3 * least, return_mode="median") / 1e3
        return do_bench(call, warmup=1e3 * least / 5, rep=1e3 * least, return_mode="median") / 1e3
    taken = []
    while sum(taken) < least or len(taken) < 3:
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def copied_per_second(least: float) -> float:
    """Bytes that a copy reads and writes."""
    size = 1 << (30 if CUDA else 20)
    one, other = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * size / seconds(lambda: other.copy_(one), least)


def elu1_peer() -> Callable | None:
    """flash-bidirectional-linear-attention of elu + 1, or None where it is not installed."""
    try:
        from flash_bla.ops.linear_attn.fused import linear_attention
    except ImportError:
        return None
    return lambda q, k, v: linear_attention(F.elu(q) + 1, F.elu(k) + 1, v)


def both_passes(call: Callable[[], Tensor], leaves: Sequence[Tensor], least: float) -> list[float]:
    """Seconds of forward without a graph for backward, and of backward by `leaves`."""
    with torch.no_grad():
        forward = seconds(call, least, graph=True)
    out = call()
    direction = torch.randn_like(out)
    return [forward, seconds(lambda: torch.autograd.grad(out, leaves, direction, retain_graph=True), least)]


def compared(taken: dict[str, list[float]], place: str, least_bytes: list[int], rate: float) -> list[list[str]]:
    """The lines of what `both_passes` gave by name: times, those of the first over them, the share of copying."""
    lines, base = [], next(iter(taken.values()))
    for name, found in taken.items():
        cells = [f"{1e6 * s:,.0f}" for s in found] + [f"{a / b:.2f}" for a, b in zip(base, found, strict=True)]
        cells += [f"{n / rate / s:.0%}" for n, s in zip(least_bytes, found, strict=True)]
        lines.append([name, place, *cells])
    return lines


def attention_table(shapes: list[tuple[int, int, int, int]], rate: float, least: float) -> str:
    """Of every operator and peer, for shapes B, N, H, K, N a square + 1; a copy moves `rate` bytes per second."""
    rows = []
    for B, N, H, K in shapes:
        qkv = torch.randn(B, N, 3, H, K, device=DEVICE, dtype=DTYPE, requires_grad=True)
        least_bytes = [qkv.numel() // 3 * qkv.element_size() * n for n in (4, 7)]
        grid = (math.isqrt(N - 1),) * 2  # behind a class token
        calls: dict[str, tuple[str, Callable]] = {"softmax, SDPA": ("torch", F.scaled_dot_product_attention)}
        if shapes[0] == (B, N, H, K) and (peer := elu1_peer()):  # it tunes itself for minutes for each length
            calls["elu1, flash-bidirectional-linear-attention"] = ("torch", peer)
        for name in OPERATORS:
            op = build_operator(name, Shape(H * K, H, K, 1)).to(DEVICE)
            for how in ("triton", "torch") if CUDA else ("torch",):
                calls[f"{name}, {how}"] = (how, lambda q, k, v, op=op, grid=grid: op(q, k, v, q, grid))
        taken = {}
        for name, (how, call) in calls.items():
            with implementation(how):
                of_qkv = partial(lambda call, qkv: call(*qkv.permute(2, 0, 3, 1, 4)), call, qkv)
                taken[name] = both_passes(of_qkv, [qkv], least)
        rows += compared(taken, f"{B} x {N} x {H} x {K}", least_bytes, rate)
    head = ["attention", "B x N x H x K", "forward, us", "backward, us", "SDPA / it", "backward",
            "share of copying", "backward"]  # fmt: skip
    return markdown(head, rows)


def addition_table(shapes: list[tuple[int, int, int, int]], name: str, rate: float, least: float) -> str:
    """Of an addition to the values or beside attention, for shapes B, side, H, K; backward is by the weights too."""
    rows = []
    for B, side, H, K in shapes:
        add = build_additions([name], Shape(H * K, H, K, 1))[name].to(DEVICE)
        N = 1 + side * side
        packed = torch.randn(4, B, N, H, K, device=DEVICE, dtype=DTYPE).transpose(2, 3)
        if add.site == "values":
            given, moves = [packed[0].requires_grad_(), None], (2, 3)
        else:
            x = torch.randn(B, N, H * K, device=DEVICE)
            given, moves = [*(tensor.detach().requires_grad_() for tensor in packed), x], (5, 10)
        leaves = [tensor for tensor in given if tensor is not None and tensor.requires_grad] + list(add.parameters())
        least_bytes = [packed[0].numel() * packed.element_size() * n for n in moves]
        taken = {}
        for how in ("torch", "triton") if CUDA else ("torch",):
            with implementation(how):
                taken[f"{name}, {how}"] = both_passes(partial(add, *given, (side, side)), leaves, least)
        rows += compared(taken, f"{B} x {side} x {side} x {H} x {K}", least_bytes, rate)
    head = ["addition", "B x grid x H x K", "forward, us", "backward, us", "torch / it", "backward",
            "share of copying", "backward"]  # fmt: skip
    return markdown(head, rows)


def ready(vit: nn.Module, images: Tensor) -> Callable[[], object]:
    """A call of the model's forward on `images`: compiled block by block and captured in a CUDA graph, on a GPU."""

    def call() -> Tensor:
        with torch.no_grad():
            return vit(images)

    if not CUDA:
        return call
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class NoAttention(nn.Module):
    """In place of an operator: costs nothing."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, H, N, K] each -> [B, H, N, K]."""
        return v


def built(name: str, size: int, kind: str, operator: str, additions: list[str]) -> nn.Module:
    """A model of random weights."""
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=size, num_classes=0).eval()
    if kind != "softmax":
        vit = linearize(vit, operator=operator, additions=additions if kind == "linear" else [])
    for block in vit.blocks if kind == "none" else ():
        block.attn.operator = NoAttention()
    return vit.to(DEVICE, DTYPE)


def peak_memory(vit: nn.Module, size: int) -> list[float]:
    """MiB of a forward pass of one image, and of one with backward."""
    images = torch.randn(1, 3, size, size, device=DEVICE, dtype=DTYPE)
    held = sum(p.numel() * p.element_size() for p in vit.parameters())
    peak = Peak(DEVICE)
    with torch.no_grad():
        vit(images)
    wait()
    found = [(held + peak()) / 2**20]
    vit(images).sum().backward()
    held += sum(p.grad.numel() * p.grad.element_size() for p in vit.parameters() if p.grad is not None)
    peak = Peak(DEVICE)
    vit(images).sum().backward()
    wait()
    vit.zero_grad(set_to_none=True)
    return [*found, (held + peak()) / 2**20]


def profile(names: list[str], args: argparse.Namespace) -> str:
    """Of models that are not compiled: time of the larger batch, and the kernels that take most of it."""
    said = []
    for name, size, kind in itertools.product(names, args.sizes, ("softmax", "linear")):
        vit = built(name, size, kind, args.operator, args.additions)
        count = vit.patch_embed.num_patches + vit.num_prefix_tokens
        images = torch.randn(max(1, args.tokens // count), 3, size, size, device=DEVICE, dtype=DTYPE)

        def forward(vit: nn.Module = vit, images: Tensor = images) -> None:
            with torch.no_grad():
                vit(images)

        def training(vit: nn.Module = vit, images: Tensor = images) -> None:
            vit(images).sum().backward()
            vit.zero_grad(set_to_none=True)

        for call in (forward, training):
            took = seconds(call, args.seconds)
            with torch.profiler.profile() as seen:
                call()
                wait()
            order = f"self_{DEVICE.type}_time_total"
            kernels = seen.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60)
            said.append(f"{name}, {kind}, {len(images)} images of {size} pixels, {call.__name__}: {1e3 * took:.1f} ms")
            said.append(kernels)
    return "\n".join(said)


def models_table(names: list[str], args: argparse.Namespace) -> str:
    """Forward of softmax and linear, in turns, and the memory of both."""
    rows, memory = [], []
    for name, size in itertools.product(names, args.sizes):
        vits = {kind: built(name, size, kind, args.operator, args.additions) for kind in ("softmax", "linear", "none")}
        count = vits["softmax"].patch_embed.num_patches + vits["softmax"].num_prefix_tokens
        if not args.build:
            found = zip(*(peak_memory(vits[kind], size) for kind in ("softmax", "linear")), strict=True)
            cells = [(f"{one:,.0f}", f"{other:,.0f}", f"{other / one:.2f}") for one, other in found]
            memory.append([name, f"{size}", *cells[0], *cells[1]])
        for vit in vits.values() if CUDA else ():
            for block in vit.blocks:
                block.compile(fullgraph=True, dynamic=False)
        for batch in sorted({1, max(1, args.tokens // count)}):
            images = torch.randn(batch, 3, size, size, device=DEVICE, dtype=DTYPE)
            calls = {kind: ready(vit, images) for kind, vit in vits.items()}
            if args.build:
                continue
            turns = [{kind: seconds(call, args.seconds / 3) for kind, call in calls.items()} for _ in range(3)]
            softmax, linear, none = (statistics.median(turn[kind] for turn in turns) for kind in vits)
            target = FASTER.get(size)
            met = "" if target is None else f"{target:g}: {'met' if softmax / linear >= target else 'missed'}"
            rows.append([name, f"{size}", f"{count:,}", f"{batch}", f"{1e3 * softmax / batch:.3f}",
                         f"{1e3 * linear / batch:.3f}", f"{softmax / linear:.2f}",
                         f"{softmax / none:.2f}", met])  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
            del calls
        torch.compiler.reset()
    head = ["model", "pixels", "tokens", "images", "softmax, ms per image", "linear", "softmax / linear",
            "softmax / no attention", "target"]  # fmt: skip
    of_memory = ["model", "pixels", "inference: softmax, MiB", "linear", "linear / softmax", "training: softmax, MiB",
                 "linear", "linear / softmax"]  # fmt: skip
    said = f"Linear attention: {' + '.join([args.operator, *args.additions])}."
    return f"{said}\n\n{markdown(head, rows)}\n{markdown(of_memory, memory)}"


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"vit_{size}_patch16_224" for size in ("small", "base", "large")]
    parser.add_argument("--models", nargs="*", default=names, help="timm's names")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048], help="pixels")
    parser.add_argument("--operator", default="focused")
    parser.add_argument("--additions", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=32768, help="of the larger batch")
    parser.add_argument("--seconds", type=float, default=0.15, help="of a figure")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that it runs")
    parser.add_argument("--convolution", action="store_true", help="only the tables of additions")
    parser.add_argument("--profile", action="store_true", help="only where the time of --models goes, uncompiled")
    parser.add_argument("--build", action="store_true", help="only fill the compilers' caches")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench-gpu.md")
    args = parser.parse_args()
    began = time.monotonic()
    shapes = [(1, 257, 16, 64), (128, 257, 16, 64), (32, 1025, 16, 64), (8, 4097, 16, 64), (2, 16385, 16, 64)]
    if args.tiny:
        shapes, args.models, args.sizes, args.tokens, args.seconds = [(1, 17, 2, 8)], ["test_vit"], [32], 34, 0.01
    grids = [(1, 4, 2, 8)] if args.tiny else [(127, 16, 16, 64), (8, 64, 16, 64), (1, 16, 16, 64)]
    where = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU thread(s), no GPU"
    said = [f"{where}, torch {torch.__version__}, bf16"]
    if args.profile:
        print(profile(args.models, args))
        return
    if not args.build:
        rate = copied_per_second(args.seconds)
        said.append(f"A copy moves {rate / 1e9:,.0f} GB/s.")
        said += [] if args.convolution else [attention_table(shapes, rate, args.seconds)]
        said += [addition_table(grids, name, rate, args.seconds) for name in ("value_conv5", "neighborhood3")]
        print("\n\n".join(said), flush=True)
    if args.convolution:
        return
    table = models_table(args.models, args)
    if args.build:
        return
    said += [table, f"{time.monotonic() - began:.0f} s"]
    print("\n\n".join(said[-2:]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n\n".join(said) + "\n")


if __name__ == "__main__":
    main()
