"""The DeepSpeed engine and its configuration."""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from trainer.config import Settings, UserError
from trainer.ranks import world

# isort: split
import deepspeed
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig


def accumulation(settings: Settings, size: int) -> int:
    """Micro-batches per rank and optimizer step: the fewest that keep to `micro_batch_size`.

    So that setting may stay as it is at another number of ranks. Raises UserError when the ranks cannot share the
    global batch.
    """
    train = settings.train
    share, left = divmod(train.batch_size, size)
    if left:
        raise UserError(f"train.batch_size {train.batch_size}: must be a multiple of {size} ranks")
    most = train.micro_batch_size or share
    return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= most)


def deepspeed_config(settings: Settings, size: int) -> dict[str, Any]:
    """The DeepSpeed JSON with batch size, precision and clipping filled in from the settings, which rule.

    Raises:
        UserError: the file is missing, does not parse, asks for no ZeRO stage, or contradicts a setting.
    """
    path = Path(settings.deepspeed)
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"--deepspeed {path}: cannot be read ({error.strerror}); ds_configs/ has some to choose from"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed {path}: not JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise UserError(f"--deepspeed {path}: has no section zero_optimization")
    if config["zero_optimization"].get("stage") not in (1, 2, 3):
        raise UserError(f"--deepspeed {path}: zero_optimization.stage must be 1, 2 or 3")
    for section in ("offload_optimizer", "offload_param"):
        offload = config["zero_optimization"].get(section)
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            raise UserError(
                f"--deepspeed {path}: zero_optimization.{section}.device nvme: checkpoints do not cover it; use cpu"
            )
    for section in ("bf16", "fp16"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"--deepspeed {path}: {section} {config[section]!r}: must be a section; remove it there")
    for section in ("optimizer", "scheduler", "fp16"):
        if section in config and (section != "fp16" or config[section].get("enabled")):
            raise UserError(
                f"--deepspeed {path}: {section} is not taken from there; remove it and use the train settings"
            )
    types = config.get("data_types") or {}
    fp32_sums = isinstance(types, dict) and types.get("grad_accum_dtype") not in (None, "bf16", "bfloat16")
    if fp32_sums and settings.train.bf16 and config["zero_optimization"]["stage"] == 1:
        what = "DeepSpeed keeps such state in an optimizer of its own, which cannot be saved here"
        raise UserError(f"--deepspeed {path}: data_types {types} in ZeRO 1: {what}; remove it, or use stage 2 or 3")
    if settings.train.compile and config["zero_optimization"]["stage"] == 3:
        why = "its hooks break the compiled graph at every module"
        raise UserError(f"train.compile: does not work with ZeRO 3 ({why}); use ds_configs/zero2.json, or leave it off")
    accumulate = accumulation(settings, size)
    ours = {
        "train_batch_size": (settings.train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (settings.train.batch_size // (size * accumulate), "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulate, "train.micro_batch_size"),
        "gradient_clipping": (settings.train.clip_grad, "train.clip_grad"),
        "bf16": ({"enabled": settings.train.bf16}, "train.bf16"),
    }
    known = [*ours, "zero_optimization", "optimizer", "scheduler", "fp16"]
    for key in config:  # DeepSpeed passes over what it does not know
        near = difflib.get_close_matches(key, known, 1, cutoff=0.85)
        if near and key not in known:
            raise UserError(f"--deepspeed {path}: {key}: no such key; did you mean {near[0]}?")
    for key, (value, name) in ours.items():
        theirs = config.get(key, "auto")
        if isinstance(value, dict):  # bf16: other fields than `enabled` are the file's
            theirs = theirs if isinstance(theirs, dict) else {}
            value = {**theirs, **value} if theirs.get("enabled", "auto") in ("auto", value["enabled"]) else value
        if theirs not in ("auto", value) and not (isinstance(theirs, dict) and theirs.items() <= value.items()):
            raise UserError(
                f"--deepspeed {path}: {key} {theirs} contradicts {name}, which gives {value}; remove it there"
            )
        config[key] = value
    for section, kind in (("zero_optimization", DeepSpeedZeroConfig), ("bf16", DeepSpeedBF16Config)):
        try:
            kind(**config[section])
        except ValidationError as error:
            first = error.errors()[0]
            where, why = ".".join(map(str, (section, *first["loc"]))), first["msg"].lower()
            raise UserError(f"--deepspeed {path}: {where}: DeepSpeed refuses it ({why}); mend or remove it") from error
    _check_partitions(path, DeepSpeedZeroConfig(**config["zero_optimization"]), size)
    if sums_in_fp32(config["zero_optimization"]["stage"], accumulate, settings.train.bf16, offloads(config)):
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    if size == 1:  # there is nothing to overlap, and DeepSpeed would wait for the device after each backward
        config["zero_optimization"]["overlap_comm"] = False
    # Our AdamW is torch's with an average beside; the log lines are ours. DeepSpeed's timer of throughput would wait
    # for the device twice per micro-batch.
    timers = {"timers": {"throughput": {"enabled": False}}}
    return {**timers, **config, "zero_allow_untested_optimizer": True, "steps_per_print": None}


def _check_partitions(path: Path, zero: DeepSpeedZeroConfig, size: int) -> None:
    """Raises UserError where second partitions (hpZ of ZeRO++, arXiv 2306.10209) do not fit stage or ranks."""
    within = zero.zero_hpz_partition_size
    if within > 1 and (zero.stage < 3 or size % min(within, size)):
        needs = "stage 3" if zero.stage < 3 else f"a divisor of the {size} ranks"
        what = f"zero_optimization.zero_hpz_partition_size {within}"
        raise UserError(f"--deepspeed {path}: {what}: needs {needs}; give the GPUs per node, or remove it")


def sums_in_fp32(zero: int, accumulate: int, bf16: bool, offload: bool) -> bool:
    """Whether the gradients of micro-batches are added in fp32: in ZeRO 2 and 3, unless the file says otherwise.

    In bf16 the sum of 16 is off by 0.5 %, that of 128 by 1.2 %.
    """
    return bf16 and accumulate > 1 and zero >= 2 and not offload


def offloads(config: dict[str, Any]) -> bool:
    """Whether the optimizer state lies in host memory."""
    section = config["zero_optimization"].get("offload_optimizer") or {}
    return section.get("device", "none") != "none"


def build_engine(stage: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> DeepSpeedEngine:
    """The DeepSpeed engine around a stage.

    Raises:
        UserError: DeepSpeed refuses its configuration.
    """
    try:
        engine, *_ = deepspeed.initialize(model=stage, optimizer=optimizer, config=config)
    except (DeepSpeedConfigError, ValueError) as error:
        raise UserError(f"DeepSpeed refuses its configuration: {' '.join(str(error).split())}") from error
    if not offloads(config):
        _read_norm_once(engine.optimizer)
    return engine


def _read_norm_once(zero: Any) -> None:
    """Let a ZeRO optimizer read the norm of the gradient once per step: one collective, and one wait for the device.

    DeepSpeed's own waits several times per parameter group: for the norm, and to see whether it is finite. It looks for
    gradients that are not finite in a pass of its own too (ZeRO 1 and 2); their norm says the same.
    """

    def global_norm(*_: Any, **__: Any) -> torch.Tensor:
        gradients = [x for group in zero.averaged_gradients.values() for x in group or () if x is not None]
        norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in gradients]
        squares = torch.stack(norms).square().sum() if norms else torch.zeros((), device=zero.device)
        world.dist.all_reduce(squares)
        return squares.sqrt().to("cpu", copy=True)  # what DeepSpeed asks of it then lies on the host

    if hasattr(zero, "scaled_global_norm"):  # ZeRO 1 and 2
        zero.scaled_global_norm = global_norm
        if zero.compute_grad_norm and zero.check_grad_overflow:
            zero.has_overflow = lambda *_, **__: False
    else:
        zero._get_norm_groups = lambda: [global_norm()]


def shard_frozen(vit: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> DeepSpeedEngine:
    """Spread a frozen ViT's parameters over the ranks, ZeRO 3's way; a collective.

    Each block's are gathered while it runs, so all ranks must call the model equally often. A block at a time is cast
    and moved: no device holds the whole model.

    Returns:
        What must live as long as the model is called. The model itself is called as before.
    """
    config = {
        "train_micro_batch_size_per_gpu": 1,  # which DeepSpeed wants, and nothing here uses
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    for part in (*vit.blocks, vit):
        part.to(dtype)
        deepspeed.zero.Init(module=part, config_dict_or_path=config, dtype=dtype)
    for module in vit.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return deepspeed.initialize(model=vit, config=config)[0]


def set_working_copy(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite the copy of a parameter that forward uses; its fp32 master stays. A collective."""
    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
