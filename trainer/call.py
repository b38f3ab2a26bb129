"""`convert`: the command `trainer/run.py --stage all`, from Python."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import Settings, names
from trainer.output.paths import stage_path

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).parents[1]
SAID = 40  # last lines of the command that an error can be found in


def convert(
    teacher: "str | nn.Module",
    images: str | Path | None = None,
    run: str | Path = "runs/own",
    weights: str | Path | None = None,
    val: str | Path | None = None,
    **settings: Any,
) -> "nn.Module":
    """Convert a softmax ViT: what is missing of the stages 1 and 2, and of 3 where the images have labels.

    It runs `trainer/run.py --stage all` in processes of its own, on all GPUs that torch sees, and passes on what that
    prints. Called again with the same arguments it goes on where it stopped, or gives back what is done.

    Args:
        teacher: timm's name of the architecture; or a timm model, whose weights are then saved in the run folder.
        images: a folder of images, or what else `data.train` takes.
        run: the run folder.
        weights: a file of the teacher's weights, in place of the hub's.
        val: images to evaluate on; by default as `data.val`.
        settings: any others, by their groups or full names: `train={"steps": 500}`, `config="adala"`,
            `**{"data.image_size": 224}`. Paths in them are relative to the clone.

    Returns:
        The student, as `unsoftmax.load` gives it.

    Raises:
        ValueError: a mistake, in the line that the command says.
        RuntimeError: it was stopped, or failed.
    """
    run = Path(run).expanduser().absolute()
    given: dict[str, Any] = {"teacher.name": teacher, "run": str(run)}
    for name, path in {"data.train": images, "data.val": val, "teacher.weights": weights}.items():
        if path is not None:
            given[name] = _absolute(path)
    if not isinstance(teacher, str):
        if weights is not None:
            raise ValueError("weights: are the model's own where a model is given; leave one of the two out")
        given |= saved(teacher, run, settings.pop("teacher.kwargs", None))
    argv = [str(Path("trainer") / "run.py"), "--stage=all", *arguments(given), *arguments(settings)]
    _run([*_launcher(), *argv])
    import models

    exports = (stage_path(run, stage) / "export" for stage in "321")
    return models.load(next(export for export in exports if (export / "config.json").is_file()))


def arguments(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings as one would type them."""
    known = dict(names(Settings))
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in known:
            yield from arguments(value, f"{name}.")
        else:
            yield f"--{name}={os.fspath(value) if isinstance(value, str | os.PathLike) else json.dumps(value)}"


def saved(vit: "nn.Module", run: Path, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A timm model as a teacher: its weights in `RUN/teacher.safetensors`, its name, and what differs from timm's.

    Args:
        kwargs: what it was built with beside its name, where that cannot be seen of it.

    Raises:
        ValueError: it is no model of timm's, or was built with more than can be seen.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    described = getattr(vit, "pretrained_cfg", None) or {}
    name, tag = described.get("architecture"), described.get("tag")
    if name is None or not timm.is_model(name):
        raise ValueError(f"teacher: {type(vit).__name__} is no model that timm made; give its name and weights=FILE")
    full = f"{name}.{tag}" if tag and timm.models.is_model_pretrained(f"{name}.{tag}") else name
    chosen = {"num_classes": vit.num_classes, **(kwargs or {})}
    with torch.device("meta"):
        if kwargs is None:
            plain = timm.create_model(name)
            size = tuple(vit.patch_embed.img_size)
            chosen |= {} if size == tuple(plain.patch_embed.img_size) else {"img_size": list(size)}
            chosen |= {} if vit.global_pool == plain.global_pool else {"global_pool": vit.global_pool}
        try:
            built = timm.create_model(name, **chosen)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(
                f"teacher: {name} cannot be built with {chosen} ({' '.join(str(error).split())})"
            ) from error
    shapes = {key: value.shape for key, value in vit.state_dict().items()}
    if shapes != {key: value.shape for key, value in built.state_dict().items()}:
        raise ValueError(
            f"teacher: the model is not timm's {name} with {chosen} alone; say what it was built with, as in "
            f'convert(vit, ..., **{{"teacher.kwargs": {{"depth": 6}}}})'
        )
    file = run / "teacher.safetensors"
    run.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file({key: value.detach().cpu().contiguous() for key, value in vit.state_dict().items()}, part)
    os.replace(part, file)
    return {"teacher.name": full, "teacher.kwargs": chosen, "teacher.weights": str(file)}


def _absolute(path: str | Path) -> str:
    """A path as it is where the command runs; names of data sets are left alone."""
    there = Path(path).expanduser()
    return str(there.absolute()) if there.exists() else str(path)


def _launcher() -> list[str]:
    import torch

    several = torch.cuda.device_count() > 1
    return [str(Path(sys.executable).with_name("deepspeed"))] if several else [sys.executable]


def _run(command: list[str]) -> None:
    """Raises ValueError or RuntimeError when the command does not end with 0; an interrupt goes on to it first."""
    last: deque[str] = deque(maxlen=SAID)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            last.append(line)
            print(line, end="", flush=True)
        status = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.communicate()
        raise
    said = re.search(r"(?m)^error: (.*)", "".join(last))
    if status == 2 and said:
        raise ValueError(said[1])
    if status:
        raise RuntimeError(f"ended with status {status}{f': {said[1]}' if said else ''}; call it again to go on")
