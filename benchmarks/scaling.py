"""Stage 2 on 8 to 512 GPUs, on paper: `make bench-scaling`. With `ARGS=--check` what can be measured without GPUs.

Memory and FLOPs are what `--dry_run` counts, on the shapes of the real models. The rest follows from what the machine
is taken to be, which options set: time is FLOPs over a share of the peak; what a rank sends a step is counted from the
published algorithms, and takes its time over the slowest link. Nothing here was run on such a machine.

`--check` measures the memory estimate against two CPU ranks, and how many images per core decodes for training.
"""

import argparse
import functools
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import timm
import torch

from benchmarks.common import ROOT, Peak, markdown
from data import train_loader
from data.write import write
from models import linearize
from trainer.config import parse
from trainer.engine.engine import DeepSpeedZeroConfig, build_engine, deepspeed_config
from trainer.engine.optim import build_optimizer
from trainer.ranks.world import end, join, leave, this_process
from trainer.setup.dry_run import GIB, measure, memory_bytes
from trainer.stages.base import Stage
from trainer.stages.feature_alignment.stage import FeatureAlignment

# name -> (timm's name, image sizes that its patches divide, nearest to 512 and 1024 pixels)
TEACHERS = {
    "DINOv2-L": ("vit_large_patch14_dinov2", (518, 1022)),
    "DINOv3-7B": ("vit_7b_patch16_dinov3", (512, 1024)),
}
RANKS = (8, 32, 128, 512)
BYTES = 2  # of a weight or gradient that is sent, bf16


class Model(NamedTuple):
    """A teacher and its student in stage 2 at one size."""

    name: str
    size: int
    trained: int
    frozen: int
    teacher: int
    flops: float  # an image
    flops_checkpointed: float
    activations: dict[bool, tuple[int, int]]  # by checkpointing: bytes at most of micro-batches of 1 and 2 images

    def activation_bytes(self, checkpointing: bool, micro: int) -> float:
        """Bytes at most of a micro-batch."""
        one, two = self.activations[checkpointing]
        return one + (micro - 1) * (two - one)


def stage_of(name: str, size: int, device: str, *options: str) -> Stage:
    """Stage 2 from copied weights, random ones."""
    settings = parse(["--stage", "2", "--tracking", "[]", *options])
    torch.manual_seed(0)
    with torch.device(device):
        teacher = timm.create_model(name, img_size=size, num_classes=0)
        return FeatureAlignment(settings, linearize(teacher), teacher, 0, {})


def model_of(name: str, size: int) -> Model:
    """Parameters, FLOPs and activations, over shapes alone."""
    found = {}
    for checkpointing in (False, True):
        stage = stage_of(TEACHERS[name][0], size, "meta", "--train.grad_checkpointing", str(checkpointing).lower())
        found[checkpointing] = [measure(stage, size, micro, torch.bfloat16) for micro in (1, 2)]
    trained, frozen, teacher = sizes_of(stage)
    activations = {key: (one[1], two[1]) for key, (one, two) in found.items()}
    return Model(name, size, trained, frozen, teacher, found[False][0][0], found[True][0][0], activations)


def sizes_of(stage: Stage) -> tuple[int, int, int]:
    """Parameters: trained, frozen of the student, of the teacher."""
    trained, frozen = (sum(p.numel() for p in stage.parameters() if p.requires_grad == t) for t in (True, False))
    return trained, frozen, sum(p.numel() for p in stage.teacher.parameters())


class Plan(NamedTuple):
    """How a model is trained on so many ranks: what fits, and what it takes."""

    zero: int
    checkpointing: bool
    micro: int
    accumulate: int
    memory: float  # bytes a rank
    sent: float  # bytes a rank and step
    compute: float  # seconds per step
    communicate: float


@functools.cache
def zero_config(zero: int) -> DeepSpeedZeroConfig:
    """`zero_optimization` of ds_configs."""
    settings = parse(["--stage", "2", "--deepspeed", str(ROOT / f"ds_configs/zero{zero}.json")])
    return DeepSpeedZeroConfig(**deepspeed_config(settings, 8)["zero_optimization"])


def memory_of(model: Model, zero: int, ranks: int, checkpointing: bool, micro: int, accumulate: int) -> float:
    """Bytes per rank, as `--dry_run` estimates them; without a micro-batch for `micro` 0."""
    activations = model.activation_bytes(checkpointing, micro) if micro else 0
    sizes, known = (model.trained, model.frozen, model.teacher), zero_config(zero)
    return memory_bytes(*sizes, known, ranks, True, False, activations, accumulate)


def sent_bytes(model: Model, zero: int, ranks: int, accumulate: int) -> float:
    """Bytes that a rank sends a step, arXiv 1910.02054, section 7: rings, each of (ranks - 1) / ranks of the data.

    ZeRO 1: gradients reduced and scattered, then weights gathered. ZeRO 2: gradients for every micro-batch. ZeRO 3: for
    every micro-batch weights gathered in forward and in backward, and gradients scattered.
    """
    rounds = {1: 2, 2: accumulate + 1, 3: 3 * accumulate}[zero]
    weights = model.trained + (model.frozen if zero == 3 else 0)
    return rounds * weights * BYTES * (ranks - 1) / ranks


def plan_of(model: Model, zero: int, ranks: int, options: argparse.Namespace) -> Plan | None:
    """The quickest of what fits, by micro-batch and checkpointing; None: nothing fits."""
    share = options.batch // ranks
    link = options.nvlink if ranks <= options.gpus_per_node else options.network
    plans = []
    for checkpointing in (False, True):
        for micro in (2**i for i in range(share.bit_length()) if share % 2**i == 0):
            accumulate = share // micro
            sent = sent_bytes(model, zero, ranks, accumulate)
            flops = share * (model.flops_checkpointed if checkpointing else model.flops)
            plans.append(Plan(
                zero, checkpointing, micro, accumulate, memory_of(model, zero, ranks, checkpointing, micro, accumulate),
                sent, flops / (options.peak * 1e12 * options.share), sent / (link * 1e9 * options.link_share),
            ))  # fmt: skip
    fitting = [plan for plan in plans if plan.memory <= options.memory * 1e9 * options.usable]
    return min(fitting, key=lambda plan: (plan.compute + plan.communicate, -plan.micro), default=None)


def tables(options: argparse.Namespace) -> str:
    """All of it, in Markdown."""
    said = []
    for name, (_, sizes) in TEACHERS.items():
        for size in sizes:
            model = model_of(name, size)
            said.append(f"### {name} at {size} pixels\n\n{facts(model)}\n")
            rows, stages = [], []
            for ranks in RANKS:
                plans = [plan_of(model, zero, ranks, options) for zero in (1, 2, 3)]
                stages.append(
                    [f"{ranks}", *(f"{memory_of(model, z, ranks, False, 0, 2) / GIB:.1f}" for z in (1, 2, 3))]
                )
                rows += [[f"{ranks}", *row_of(plan, ranks, options)] for plan in plans if plan is not None]
            said.append(markdown(["GPUs", "ZeRO 1, GiB", "ZeRO 2, GiB", "ZeRO 3, GiB"], stages))
            said.append(markdown(COLUMNS, rows))
            said.append(f"{limit(model, options)}\n")
    return "\n".join(said)


COLUMNS = ["GPUs", "ZeRO", "checkpointing", "micro-batch x accumulated", "GiB a GPU", "GB sent a GPU and step",
           "s computing", "s sending", "images/s", "images/s a node", "computing"]  # fmt: skip


def facts(model: Model) -> str:
    """What is counted, in a line."""
    per_image = {key: (two - one) / GIB for key, (one, two) in model.activations.items()}
    return (
        f"{model.trained / 1e9:.2f} billion parameters trained, {model.teacher / 1e9:.2f} of the teacher; "
        f"{model.flops / 1e12:.1f} TFLOPs per image, {model.flops_checkpointed / 1e12:.1f} with gradient "
        f"checkpointing; {per_image[False]:.2f} GiB of activations per image, {per_image[True]:.2f} with it."
    )


def row_of(plan: Plan, ranks: int, options: argparse.Namespace) -> list[str]:
    """A row of the second table; ranges go from sending after computing to sending hidden behind it."""
    seconds = (plan.compute + plan.communicate, max(plan.compute, plan.communicate))
    nodes = max(1, ranks // options.gpus_per_node)
    return [
        f"{plan.zero}", "yes" if plan.checkpointing else "no", f"{plan.micro} x {plan.accumulate}",
        f"{plan.memory / GIB:.1f}", f"{plan.sent / 1e9:.1f}", f"{plan.compute:.3g}", f"{plan.communicate:.2g}",
        span(*(f"{options.batch / s:,.0f}" for s in seconds)),
        span(*(f"{options.batch / s / nodes:,.0f}" for s in seconds)),
        span(*(f"{plan.compute / s:.0%}" for s in seconds)),
    ]  # fmt: skip


def span(low: str, high: str) -> str:
    """`low to high`, or one where they are the same."""
    return low if low == high else f"{low} to {high}"


def limit(model: Model, options: argparse.Namespace) -> str:
    """From how many GPUs on a step of one global batch waits for the network as long as it computes, ZeRO 1."""
    compute = options.batch * model.flops / (options.peak * 1e12 * options.share)
    send = 2 * model.trained * BYTES / (options.network * 1e9 * options.link_share)
    ranks = compute / send
    return (
        f"At a global batch of {options.batch:,}, ZeRO 1 sends as long as it computes on {ranks:,.0f} GPUs: "
        f"below {options.batch / ranks:.1f} images a GPU and step."
    )


def check(options: argparse.Namespace) -> str:
    """The estimate of `--dry_run` and the peak of the resident set, of two CPU ranks."""
    rows = []
    for zero, checkpointing in ((1, False), (2, False), (3, False), (1, True), (3, True)):
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer"
            args = (zero, checkpointing, options.model, options.size, options.micro, str(answer))
            port = 20000 + os.getpid() % 20000
            context = multiprocessing.get_context("spawn")
            ranks = [context.Process(target=rank_of, args=(rank, port, *args)) for rank in range(2)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            estimated, measured = map(float, answer.read_text().split())
        rows.append([
            f"ZeRO {zero}{', checkpointing' if checkpointing else ''}", f"{estimated / 2**20:,.0f}",
            f"{measured / 2**20:,.0f}", f"{measured / estimated:.2f}",
        ])  # fmt: skip
    title = f"{options.model} at {options.size} pixels, 2 ranks, {options.micro} images each"
    table = markdown(["", "estimated, MiB", "measured", "measured / estimated"], rows)
    rates = ", ".join(f"{decoded(size):.0f} at {size} pixels" for size in (518, 1022))
    return f"{title}\n\n{table}\nImages per second and core, decoded from JPEGs of 640 x 480 and cut: {rates}"


class Pictures:
    """Smooth noise of 640 x 480 pixels, some 110 KB as a JPEG."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index >= len(self):
            raise IndexError(index)
        noise = np.random.default_rng(index).integers(0, 256, (160, 213, 3), dtype=np.uint8)
        return cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC), 0


def decoded(size: int) -> float:
    """Training images per second of CPU time, decoded, cut to `size` pixels and normalised."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.beton"
        write(Pictures(), path, raw_share=0, workers=1, progress=False)
        loader = train_loader(path, image_size=size, batch_size=8, scale=(0.25, 1.0), workers=1)
        for _ in loader.epoch(0):
            pass
        began, images = time.process_time(), 0
        for epoch in range(1, 5):
            images += sum(len(batch["image"]) for batch in loader.epoch(epoch))
        return images / (time.process_time() - began)


def rank_of(
    rank: int, port: int, zero: int, checkpointing: bool, name: str, size: int, micro: int, answer: str
) -> None:
    """One of two ranks: two steps of stage 2; rank 0 writes what was estimated and what was taken."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    me = this_process()
    join(me)
    argv = ["--deepspeed", str(ROOT / f"ds_configs/zero{zero}.json"), "--train.batch_size", str(2 * micro)]
    argv += ["--train.grad_checkpointing", str(checkpointing).lower()]
    tiny = stage_of("vit_tiny_patch16_224", 32, "cpu")  # what libraries keep once they have run is not the model's
    tiny({"image": torch.randn(2, 3, 32, 32)})["loss"].backward()
    del tiny
    peak = Peak(me.device)
    stage = stage_of(name, size, "cpu", *argv)
    config = deepspeed_config(stage.settings, 2)
    trained, frozen, teacher = sizes_of(stage)
    _, activations = measure(stage, size, micro, torch.bfloat16)
    engine = build_engine(
        stage, build_optimizer(stage.parameter_groups(), stage.settings.train, None, False, False), config
    )
    stage.teacher.to(torch.bfloat16)
    peak.restart()
    image = torch.randn(micro, 3, size, size, dtype=torch.bfloat16)
    for _ in range(2):
        engine.backward(engine({"image": image})["loss"])
        engine.step()
    taken = peak()
    if rank == 0:
        # Of the buffer for gradients only what is written is resident on a CPU.
        zero = config["zero_optimization"]
        known = DeepSpeedZeroConfig(**zero | {"reduce_bucket_size": min(trained, zero["reduce_bucket_size"])})
        estimated = memory_bytes(trained, frozen, teacher, known, 2, True, False, activations, 1)
        Path(answer).write_text(f"{estimated} {taken}")
    leave()
    end(0)


def main() -> None:
    """Print the tables, or check the estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="the memory estimate against real ranks")
    parser.add_argument("--model", default="vit_small_patch16_224", help="of the check")
    parser.add_argument("--size", type=int, default=512, help="of the check, pixels")
    parser.add_argument("--micro", type=int, default=2, help="of the check, images a rank")
    parser.add_argument("--batch", type=int, default=1024, help="global batch")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a GPU in bf16, dense: an H100 SXM's")
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that training reaches")
    parser.add_argument("--memory", type=float, default=80, help="GB of a GPU")
    parser.add_argument("--usable", type=float, default=0.9, help="of it; the rest is CUDA's, NCCL's and fragments")
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s that a GPU sends within its node")
    parser.add_argument("--network", type=float, default=50, help="GB/s that a GPU sends to other nodes: 400 Gb/s each")
    parser.add_argument("--link_share", type=float, default=0.7, help="of a link's speed that NCCL reaches")
    options = parser.parse_args()
    print(check(options) if options.check else tables(options))


if __name__ == "__main__":
    main()
