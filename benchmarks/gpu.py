"""What the fused kernels give on a GPU: `make bench-gpu`, which writes runs/bench-gpu.md.

Attention alone: forward, and backward, of q, k, v as a packed projection gives them, against torch's flash attention,
against the same operator of torch's products, and against flash-bidirectional-linear-attention where that is installed
(`flash_bla`, whose call gets features, so that the feature map is timed with it). The share is of the time in which a
copy moves the least bytes that attention needs.

The convolution of `value_conv5` alone, likewise, against torch's.

Whole models: forward in bf16, blocks compiled, in a CUDA graph, softmax (flash) beside linear, in turns. At one image,
and at as many images as make --tokens. Memory is what a forward and backward pass of one image adds.

Figures are medians. Without a GPU all of it runs in torch's own products, which only shows that it runs.
"""

import argparse
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
OPERATORS = ("elu1", "focused", "focused_learned", "hedgehog")


def wait() -> None:
    """Until the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], least: float) -> float:
    """Median of single calls, for about `least` seconds after a warm-up."""
    if CUDA:
        from triton.testing import do_bench

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
        forward = seconds(call, least)
    out = call()
    direction = torch.randn_like(out)
    return [forward, seconds(lambda: torch.autograd.grad(out, leaves, direction, retain_graph=True), least)]


def attention_table(shapes: list[tuple[int, int, int, int]], least: float) -> str:
    """Of every operator and peer, for shapes B, N, H, K."""
    rate, rows = copied_per_second(least), []
    for B, N, H, K in shapes:
        qkv = torch.randn(B, N, 3, H, K, device=DEVICE, dtype=DTYPE, requires_grad=True)
        least_bytes = [qkv.numel() // 3 * qkv.element_size() * n for n in (4, 7)]
        calls: dict[str, tuple[str, Callable]] = {"softmax, SDPA": ("torch", F.scaled_dot_product_attention)}
        if shapes[0][1] == N and (peer := elu1_peer()):  # it tunes itself for minutes for each length
            calls["elu1, flash-bidirectional-linear-attention"] = ("torch", peer)
        for name in OPERATORS:
            op = build_operator(name, Shape(H * K, H, K)).to(DEVICE)
            for how in ("triton", "torch") if CUDA else ("torch",):
                calls[f"{name}, {how}"] = (how, lambda q, k, v, op=op: op(q, k, v, q, (0, 0)))
        taken = {}
        for name, (how, call) in calls.items():
            with implementation(how):
                of_qkv = partial(lambda call, qkv: call(*qkv.permute(2, 0, 3, 1, 4)), call, qkv)
                taken[name] = both_passes(of_qkv, [qkv], least)
        base = taken["softmax, SDPA"]
        for name, found in taken.items():
            cells = [f"{1e6 * s:,.0f}" for s in found] + [f"{a / b:.2f}" for a, b in zip(base, found, strict=True)]
            cells += [f"{n / rate / s:.0%}" for n, s in zip(least_bytes, found, strict=True)]
            rows.append([name, f"{B} x {N} x {H} x {K}", *cells])
    head = ["attention", "B x N x H x K", "forward, us", "backward, us", "SDPA / it", "backward",
            "share of copying", "backward"]  # fmt: skip
    return f"A copy moves {rate / 1e9:,.0f} GB/s.\n\n{markdown(head, rows)}"


def convolution_table(shapes: list[tuple[int, int, int, int]], name: str, least: float) -> str:
    """Of an addition to the values, for shapes B, rows and columns, H, K; backward is by the weight too."""
    rate, rows = copied_per_second(least), []
    for B, side, H, K in shapes:
        add = build_additions([name], Shape(H * K, H, K, 1))[name].to(DEVICE)
        qkv = torch.randn(B, 1 + side * side, 3, H, K, device=DEVICE, dtype=DTYPE)
        v = qkv.permute(2, 0, 3, 1, 4)[2].requires_grad_()
        least_bytes = [v.numel() * v.element_size() * n for n in (2, 3)]
        taken = {}
        for how in ("torch", "triton") if CUDA else ("torch",):
            with implementation(how):
                taken[how] = both_passes(partial(add, v, None, (side, side)), [v, add.weight], least)
        for how, found in taken.items():
            cells = [f"{1e6 * s:,.0f}" for s in found]
            cells += [f"{a / b:.2f}" for a, b in zip(taken["torch"], found, strict=True)]
            cells += [f"{n / rate / s:.0%}" for n, s in zip(least_bytes, found, strict=True)]
            rows.append([f"{name}, {how}", f"{B} x {side} x {side} x {H} x {K}", *cells])
    head = ["convolution", "B x grid x H x K", "forward, us", "backward, us", "torch / it", "backward",
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


def built(name: str, size: int, operator: str | None) -> nn.Module:
    """A model of random weights; `operator` None: softmax."""
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=size, num_classes=0).eval()
    if operator:
        vit = linearize(vit, operator=operator)
    return vit.to(DEVICE, DTYPE)


def models_table(names: list[str], sizes: list[int], operator: str, tokens: int, least: float, only_build: bool) -> str:
    """Forward of softmax and linear, in turns."""
    rows = []
    for name in names:
        for size in sizes:
            vits = {kind: built(name, size, kind) for kind in (None, operator)}
            count = vits[None].patch_embed.num_patches + vits[None].num_prefix_tokens
            memory = []
            for vit in vits.values() if not only_build else ():
                peak = Peak(DEVICE)
                images = torch.randn(1, 3, size, size, device=DEVICE, dtype=DTYPE)
                vit(images).sum().backward()
                wait()
                gradients = sum(p.grad.numel() * p.grad.element_size() for p in vit.parameters() if p.grad is not None)
                memory.append((peak() - gradients) / 2**20)
                vit.zero_grad(set_to_none=True)
            for vit in vits.values() if CUDA else ():
                for block in vit.blocks:
                    block.compile(fullgraph=True, dynamic=False)
            for batch in sorted({1, max(1, tokens // count)}):
                images = torch.randn(batch, 3, size, size, device=DEVICE, dtype=DTYPE)
                calls = {kind: ready(vit, images) for kind, vit in vits.items()}
                if only_build:
                    continue
                turns = [{kind: seconds(call, least / 3) for kind, call in calls.items()} for _ in range(3)]
                softmax, linear = (statistics.median(turn[kind] for turn in turns) for kind in vits)
                target = FASTER.get(size)
                met = "" if target is None else f"{target:g}: {'met' if softmax / linear >= target else 'missed'}"
                rows.append([name, f"{size}", f"{count:,}", f"{batch}", f"{1e3 * softmax / batch:.3f}",
                             f"{1e3 * linear / batch:.3f}", f"{softmax / linear:.2f}", met,
                             *(f"{x:,.0f}" for x in memory), f"{memory[1] / memory[0]:.2f}"])  # fmt: skip
                print(" | ".join(rows[-1]), flush=True)
                del calls
            torch.compiler.reset()
    head = ["model", "pixels", "tokens", "images", "softmax, ms per image", "linear", "softmax / linear", "target",
            "MiB of training, softmax", "linear", "linear / softmax"]  # fmt: skip
    return f"Linear attention: {operator}.\n\n{markdown(head, rows)}"


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="timm's names; by default ViT-S and ViT-L of patches of 16")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048], help="pixels")
    parser.add_argument("--operator", default="focused")
    parser.add_argument("--tokens", type=int, default=32768, help="of the larger batch")
    parser.add_argument("--seconds", type=float, default=0.15, help="of a figure")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that it runs")
    parser.add_argument("--convolution", action="store_true", help="only the table of the convolution")
    parser.add_argument("--build", action="store_true", help="only fill the compilers' caches")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench-gpu.md")
    args = parser.parse_args()
    began = time.monotonic()
    shapes = [(128, 257, 16, 64), (32, 1025, 16, 64), (8, 4097, 16, 64), (2, 16385, 16, 64)]
    names = args.models if args.models is not None else ["vit_small_patch16_224", "vit_large_patch16_224"]
    if args.tiny:
        shapes, names, args.sizes, args.tokens, args.seconds = [(1, 17, 2, 8)], ["test_vit"], [32], 34, 0.01
    grids = [(1, 4, 2, 8)] if args.tiny else [(127, 16, 16, 64), (8, 64, 16, 64), (1, 16, 16, 64)]
    where = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU thread(s), no GPU"
    said = [f"{where}, torch {torch.__version__}, bf16"]
    if not args.build:
        said += [] if args.convolution else [attention_table(shapes, args.seconds)]
        said.append(convolution_table(grids, "value_conv5", args.seconds))
        print("\n\n".join(said), flush=True)
    if args.convolution:
        return
    table = models_table(names, args.sizes, args.operator, args.tokens, args.seconds, args.build)
    if args.build:
        return
    said += [table, f"{time.monotonic() - began:.0f} s"]
    print("\n\n".join(said[-2:]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n\n".join(said) + "\n")


if __name__ == "__main__":
    main()
