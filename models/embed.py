"""Features of a folder of images as one file of safetensors: `python -m models.embed EXPORT FOLDER OUT.safetensors`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .segmenter import backbone_of
from .sources import open_model

# Pillow's formats whose readers start no other program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif", ".tga")
DEEP = ("I", "F")  # how the names of Pillow's modes with more than 8 bits per channel begin


@dataclass
class Embedded:
    """What `embed` read.

    Attributes:
        files: names below the folder, in the order of the rows.
        tensors: see `read`; [N, ...] each.
        unreadable: name -> why, of the files that look like images and cannot be read.
    """

    files: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


# A path, the timm model, images per batch and threads -> names and images [B, 3, H, W] as the model wants them; why a
# file cannot be read is written into the mapping.
Batches = Callable[[Path, nn.Module, int, int | None, dict[str, str]], Iterator[tuple[list[str], Tensor]]]


def embed(
    model: nn.Module, folder: str | Path, batch_size: int = 32, tokens: bool = False, half: bool = False,
    workers: int | None = None, batches_of: Batches | None = None,
) -> Embedded:  # fmt: skip
    """Features of all images below a folder, in the order of their names.

    They are shown to the model as it says itself (`pretrained_cfg`), turned upright by their EXIF orientation. All
    features are held in memory.

    Args:
        model: what `load` gives, or any timm model, on its device.
        tokens: keep all tokens.
        half: keep the features in fp16.
        workers: threads that decode; by default one per core.
        batches_of: reads something other than a folder.

    Raises:
        ValueError: there is no image that can be read.
        FileNotFoundError: no such folder.
    """
    folder, found, net = Path(folder), Embedded(), backbone_of(model).eval()
    parameter, rows = next(net.parameters()), []
    kind = torch.float16 if half else torch.float32
    for names, images in (batches_of or of_folder)(folder, net, batch_size, workers, found.unreadable):
        found.files += names
        batch = images.to(parameter.device, parameter.dtype)
        rows.append({key: x.to("cpu", kind) for key, x in read(net, batch, tokens).items()})
    if not rows:
        worst = next((f"; {name}: {why}" for name, why in found.unreadable.items()), "")
        raise ValueError(f"{folder}: holds no image that can be read{worst}")
    found.tensors = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    return found


def of_folder(
    folder: Path, net: nn.Module, batch_size: int, workers: int | None, unreadable: dict[str, str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of the images below a folder; see `Batches`."""
    transform = timm.data.create_transform(**given_to(net))

    def decode(name: str) -> Tensor | str:
        try:
            return transform(open_image(folder / name))
        except Exception as error:  # of another's bytes anything may be wrong
            return " ".join(str(error).split())[:200] or type(error).__name__

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for names, images in _ahead(pool, decode, image_names(folder), batch_size):
            good = {name: x for name, x in zip(names, images, strict=True) if isinstance(x, Tensor)}
            unreadable |= {name: why for name, why in zip(names, images, strict=True) if isinstance(why, str)}
            if good:
                yield list(good), torch.stack(list(good.values()))


@torch.no_grad()
def read(net: nn.Module, images: Tensor, tokens: bool = False) -> dict[str, Tensor]:
    """Features of images [B, 3, H, W]: `class_token` [B, D] where there is one, `mean_patch` [B, D], `pooled` [B, *],
    what the model's classifier reads; with `tokens` also these, [B, N, D], prefix tokens first. Of a timm model that is
    no ViT `pooled` alone.
    """
    every, found = net.forward_features(images), {}
    prefix = getattr(net, "num_prefix_tokens", None)
    if every.ndim == 3 and prefix is not None:
        if prefix:
            found["class_token"] = every[:, 0].float()
        found["mean_patch"] = every[:, prefix:].mean(1, dtype=torch.float32)
    pooled = net.forward_head(every, pre_logits=True)
    if pooled.ndim == 2:
        found["pooled"] = pooled.float()
    return found | ({"tokens": every} if tokens else {})


def given_to(net: nn.Module) -> dict[str, Any]:
    """How images are given to a timm model, in the words of `timm.data.create_transform`."""
    known = timm.data.resolve_model_data_config(net)
    size = getattr(getattr(net, "patch_embed", None), "img_size", None)
    known |= {} if size is None else {"input_size": (3, *size)}  # as it is built, which its weights may not be
    return {key: known[key] for key in ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")}


def image_names(folder: Path) -> list[str]:
    """Names below `folder`, by `/`, of the files that a suffix of images ends or whose content begins as an image's.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is a file.
    """
    if not folder.is_dir():
        if folder.exists():
            what = "; for a .beton file use python -m trainer.evaluate.embed" if folder.suffix == ".beton" else ""
            raise ValueError(f"{folder}: is a file, no folder of images{what}")
        raise FileNotFoundError(f"{folder}: no such folder")
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(place, name)
            if not name.startswith(".") and (path.suffix.lower() in SUFFIXES or _is_image(path)):
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path, formats=[name for name in FORMATS if name != "TGA"]):
            return path.is_file()
    except Exception:
        return False


def open_image(path: Path) -> Image.Image:
    """An image file in RGB, upright, alpha dropped. Raises ValueError or OSError where it cannot be read so."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("is no regular file, or a link that leads nowhere")
    with Image.open(path, formats=FORMATS) as image:
        if image.mode.startswith(DEEP):
            raise ValueError(f"has more than 8 bits per channel (Pillow's mode {image.mode})")
        return ImageOps.exif_transpose(image).convert("RGB")


def _ahead(
    pool: ThreadPoolExecutor, decode: Callable[[str], Tensor | str], names: list[str], count: int
) -> Iterator[tuple[list[str], list[Tensor | str]]]:
    """Batches of names and what `decode` gives of them; the next batch is decoded while one is used."""
    left, waiting = iter(names), None
    while True:
        part = list(islice(left, count))
        following = (part, [pool.submit(decode, name) for name in part])
        if waiting is not None:
            yield waiting[0], [future.result() for future in waiting[1]]
        if not part:
            return
        waiting = following


def write(found: Embedded, out: str | Path, **said: object) -> None:
    """Write what was read, whole or not at all. The metadata hold `files` and `unreadable` as JSON, and what is `said`.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    out = Path(out)
    part = out.with_name(out.name + ".part")
    metadata = {"files": found.files, "unreadable": found.unreadable, **said}
    save_file(
        {key: x.contiguous() for key, x in found.tensors.items()}, part,
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()},
    )  # fmt: skip
    os.umask(umask := os.umask(0))
    part.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
    os.replace(part, out)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(message))


def _fail(message: object) -> int:
    print(f"error: {' '.join(str(message).split()).replace('data.image_size', '--image_size')}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None, batches_of: Batches | None = None) -> int:
    """The command line; returns the exit status. `batches_of`: see `embed`."""
    parser = _Parser(prog=f"python -m {__spec__.name}", description="Features of a folder of images as safetensors.")
    parser.add_argument("model", help="an export's folder, hf-hub:OWNER/NAME of an export, or a name of timm's")
    parser.add_argument("folder", help="images, in any subfolders")
    parser.add_argument("out", help="the file to write, such as features.safetensors")
    parser.add_argument("--image_size", type=int, nargs="+", metavar="PIXELS", help="a side, or height and width")
    parser.add_argument("--tokens", action="store_true", help="keep all tokens, beside what is pooled")
    parser.add_argument("--batch_size", type=int, default=32, help="images per call (default 32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--half", action="store_true", help="store the features in fp16")
    parser.add_argument("--workers", type=int, help="threads that decode (default: one per core)")
    given = parser.parse_args(arguments)
    size = given.image_size
    try:
        for name, value in (("batch_size", given.batch_size), ("workers", given.workers)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        if size is not None and (len(size) > 2 or min(size) < 1):
            raise ValueError(f"--image_size {' '.join(map(str, size))}: give a side, or height and width, in pixels")
        if not Path(given.out).absolute().parent.is_dir():
            raise ValueError(f"{given.out}: its folder is not there; make it first")
        if batches_of is None:
            image_names(Path(given.folder))  # a mistake before the model is read
        model = open_model(given.model, None if size is None else (size[0], size[-1]))
        model = model.to(_device(given.device), torch.bfloat16 if given.bf16 else torch.float32)
        found = embed(model, given.folder, given.batch_size, given.tokens, given.half, given.workers, batches_of)
        write(found, given.out, model=given.model, input=given_to(backbone_of(model)))
    except (ValueError, OSError, SafetensorError) as error:
        return _fail(error)
    for name, why in found.unreadable.items():
        print(f"warning: {name}: cannot be read ({why})", file=sys.stderr)
    shapes = ", ".join(f"{key} {list(x.shape)}" for key, x in found.tensors.items())
    unread = f"; {len(found.unreadable)} files could not be read" if found.unreadable else ""
    print(f"wrote {given.out}: {shapes}{unread}")
    return 0


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: torch has no such device here ({str(error).splitlines()[0]})") from error


if __name__ == "__main__":
    sys.exit(main())
