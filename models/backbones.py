"""A softmax ViT from a timm name: pretrained from the hub, from a local file, or untrained."""

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from timm.layers.format import Format
from timm.models import VisionTransformer, load_state_dict
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import Tensor, nn


def build_backbone(
    name: str,
    kwargs: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """A timm model, in eval mode, fp32, on the CPU.

    Args:
        name: timm's name, with or without the pretrained tag.
        kwargs: architecture overrides for `timm.create_model` (`patch_size`, `depth`, `num_classes`, ...).
        weights: a local `.safetensors`, `.pth` or `.bin` file instead of the hub. Position embeddings are resized,
            and the original names of DINOv2, CLIP, SigLIP and others translated, by timm's own filter.
        pretrained: without `weights`, take the weights from the hub; False leaves them random.
        image_size: pixels, a side or (height, width); the backbone's own by default.

    Raises:
        ValueError: unknown name, overrides or size that do not fit, a file that does not fit (first keys named), or
            weights that cannot be had from the hub.
        FileNotFoundError: no such file.
    """
    kwargs = dict(kwargs or {})
    if image_size is not None:
        kwargs["img_size"] = image_size
    if not timm.is_model(name.split(".")[0]) and not name.startswith(("hf-hub:", "local-dir:")):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:3])
        raise ValueError(f"teacher.name {name!r}: timm has no such model{f', but for example {near}' if near else ''}")
    state = None
    if weights is not None:
        state, pretrained = read_weights(weights), False
        if "num_classes" not in kwargs:  # the file knows whether it has a head, and of which size
            head = state.get("head.weight")
            kwargs["num_classes"] = len(head) if head is not None and head.ndim == 2 and head.numel() else 0
    try:
        with _hub_without_long_waits() if pretrained or name.startswith("hf-hub:") else nullcontext():
            model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        if isinstance(error, NOT_BUILT) and not isinstance(error, OSError):
            said = f"teacher.name {name!r}: timm cannot build it with teacher.kwargs {kwargs} ({_one_line(error)})"
        else:
            said = (
                f"teacher.name {name!r}: its weights cannot be had from the hub ({_one_line(error)}); "
                "download them elsewhere and give the file with --teacher.weights FILE"
            )
        raise ValueError(said) from error
    check_image_size(model, kwargs.get("img_size"))
    if state is not None:
        _load(model, state, weights)
    return model.eval()


def architecture(name: str, kwargs: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """What builds the same network as `name` and `kwargs` do, without asking the hub or a folder for its description.

    Returns:
        timm's own name and all overrides, of which `hf-hub:` and `local-dir:` models bring some of their own.
    """
    source, _, place = name.partition(":")
    describe = {"hf-hub": load_model_config_from_hf, "local-dir": load_model_config_from_path}.get(source)
    if describe is None:
        return name, dict(kwargs or {})
    _, name, own = describe(place)
    return name, {**(own or {}), **(kwargs or {})}


NOT_BUILT = (TypeError, ValueError, AssertionError, AttributeError, LookupError, ArithmeticError, RuntimeError)


@contextmanager
def _hub_without_long_waits() -> Iterator[None]:
    """huggingface_hub retries an unreachable hub for most of a minute: ask once; no answer, then its cache only."""
    offline = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors`, `.pth`, `.pt` or `.bin` file, wrappers such as `state_dict` removed.

    Nothing is executed: pickles are read with `weights_only=True`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds something other than plain tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
        assert all(isinstance(value, Tensor) for value in state.values())
    except (AttributeError, TypeError, AssertionError) as error:
        raise ValueError(f"{path}: holds no state dict of tensors; save one with safetensors or torch.save") from error
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as weights: {_unreadable(path, error)}") from error
    if not state:
        raise ValueError(f"{path}: holds no state dict of tensors; save one with safetensors or torch.save")
    for key, value in state.items():
        stored = value.layout == torch.strided and value.device.type == "cpu" and value.untyped_storage().nbytes()
        if stored is False or stored < value.numel() * value.element_size():
            raise ValueError(f"{path}: {key} is no plain tensor with all its values; {_SAVE_AGAIN}")
    return state


_SAVE_AGAIN = "where you trust its source, save its state dict alone, with safetensors"


def _unreadable(path: Path, error: Exception) -> str:
    """Why, and what to do, in few words; torch's own advice is to read it unsafely."""
    if path.suffix == ".safetensors":
        said = _one_line(error).removeprefix("Error while deserializing header: ")[:100]
        return f"no safetensors file, or damaged ({said}); get it again, or name it .pth if torch.save wrote it"
    code = re.search(r"Unsupported globals: ([^ ,]+?)[.,]? |GLOBAL (\S+)", f"{error} {error.__cause__}")
    if code:
        name = code[1] or code[2]
        return f"it holds Python objects ({name}), which could run code, and none was run; {_SAVE_AGAIN}"
    if "weights_only" in str(error) and error.__cause__ is None:
        return f"a TorchScript program or an archive of old, which could run code, and none was run; {_SAVE_AGAIN}"
    return "neither written by torch.save nor safetensors, or damaged; get it again"


def _load(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate is not None:
        deit3 = {"adapt_layer_scale": True} if isinstance(model, VisionTransformer) else {}
        try:
            state = translate(state, model, **deit3)
        except Exception as error:
            raise ValueError(f"{path}: does not fit the model ({_one_line(error)}); {_MEND}") from error
    # As with weights from the hub, what the user built the model without is left in the file.
    own = model.state_dict()
    for part in ("head.", "attn_pool."):
        if not any(key.startswith(part) for key in own):
            state = {key: value for key, value in state.items() if not key.startswith(part)}
    check_fit(model, state, path, _MEND)
    check_finite(state, path)
    model.load_state_dict(state)


_MEND = "mend teacher.name or teacher.kwargs"


def check_fit(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, remedy: str) -> None:
    """Raises ValueError, naming the first keys, unless `state`, read from `path`, is a state dict of `model`."""
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
        "of another kind of number": [
            f"{key} {state[key].dtype}".replace("torch.", "")
            for key in own
            if key in state and state[key].is_floating_point() != own[key].is_floating_point()
        ],
    }
    said = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in problems.items() if keys]
    if said:
        raise ValueError(f"{path}: does not fit the model: {'; '.join(said)}; {remedy}")


def check_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises ValueError, naming the first of them, when weights read from `path` are NaN or infinite."""
    for key, value in state.items():
        if value.is_floating_point() and not (value.float() if value.element_size() == 1 else value).isfinite().all():
            raise ValueError(f"{path}: {key} is not finite; the file is damaged, or its training diverged: use another")


def check_image_size(
    model: nn.Module, image_size: int | Sequence[int] | None, setting: str = "data.image_size"
) -> None:
    """Raises ValueError when the patch size of `model` does not divide `image_size` (pixels), unless it pads."""
    patch_embed = getattr(model, "patch_embed", None)
    patch_size = getattr(patch_embed, "patch_size", None)
    if image_size is None or patch_size is None or getattr(patch_embed, "dynamic_img_pad", False):
        return
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if any(s % p for s, p in zip(size, patch_size, strict=True)):
        raise ValueError(f"{setting} {image_size}: not a multiple of the patch size {patch_size[0]}")


def take_any_size(vit: nn.Module) -> None:
    """Let `vit` take images of any size that its patches divide, positions resized in each forward pass.

    What timm's `dynamic_img_size=True` does when a model is built.
    """
    vit.dynamic_img_size = True
    vit.patch_embed.strict_img_size = False
    vit.patch_embed.flatten = False
    vit.patch_embed.output_fmt = Format.NHWC
    rope = getattr(vit, "rope", None)
    if hasattr(rope, "_use_cached_embed"):  # of the kinds that timm has, one keeps to its table whatever the size
        rope._use_cached_embed = False


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights and buffers of a model, or of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted((model.state_dict() if isinstance(model, nn.Module) else model).items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
