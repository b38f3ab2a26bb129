"""A softmax ViT from a timm name: pretrained from the hub, from a local file, or untrained."""

import difflib
import hashlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.format import Format
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from .checkpoints import Shapes, fit, one_line, open_weights, pair
from .hf import describe as describe_hf
from .hf import hub_without_long_waits, weights_of
from .parallel import with_plain_blocks


def build_backbone(
    name: str,
    kwargs: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
    weights_key: str | None = None,
    mapped: bool = False,
) -> nn.Module:
    """A timm model, in eval mode, fp32, on the CPU.

    timm's own notes on the weights, and what has to be assumed of a file, are given as warnings. Parallel blocks are
    replaced, see `parallel`.

    Args:
        name: timm's name, with or without the pretrained tag, also as the hub writes it (`timm/...`); or
            `hf-hub:OWNER/NAME` or `local-dir:FOLDER`, described there by a config.json of timm's; or `hf:OWNER/NAME` or
            `hf:FOLDER`, described by one of transformers'.
        kwargs: architecture overrides for `timm.create_model` (`patch_size`, `depth`, `num_classes`, ...). Beside
            `image_size`, `img_size` is the size that local weights were trained at.
        weights: a local file instead of the hub, of safetensors or torch.save, or the folder of a softmax export.
            Prefixes (`module.teacher.backbone.`) are found, position embeddings resized, and the original names of
            DINOv2, CLIP, SigLIP and others translated by timm's own filter.
        pretrained: without `weights`, take the weights from the hub; False leaves them random.
        image_size: pixels, a side or (height, width); the backbone's own by default.
        weights_key: the prefix to read where a file holds several networks, such as `teacher.backbone`.
        mapped: let the parameters be a local file's own, mapped into memory: the processes of a machine hold them once.
            For weights that nobody trains; the file must not be written over meanwhile.

    Raises:
        ValueError: unknown name; overrides or size that do not fit, or a network that does not take RGB images; a file
            that does not fit (first keys named), fits in several ways, has weights that the network has no place for,
            or holds a converted model; weights that cannot be had from the hub.
        FileNotFoundError: no such file.
    """
    given = dict(kwargs or {})
    _check_kwargs(given)
    arch, full = _resolve(name, given)
    if image_size is not None:
        full["img_size"] = image_size
    of_transformers = name.startswith("hf:") and pretrained and weights is None
    if weights is not None or of_transformers:
        file = weights_of(name[3:], full) if of_transformers else open_weights(weights)
        pretrained = False
        if "img_size" in given and file.trained_at is None:
            size = pair(given["img_size"])
            file.trained_at, file.built_at = (None, size) if image_size is None else (size, None)
        if "global_pool" in given or "gap" in arch.split("_"):  # SigLIP's tokens, without what pools them
            file.may_stay += ("attn_pool.",)

        @cache
        def shapes(num_classes: int, arch: str = arch) -> nn.Module:
            with torch.device("meta"):
                model = _create(name, arch, full | {"num_classes": num_classes}, given)
            check_image_size(model, full.get("img_size"))
            return model

        def variants() -> Iterator[tuple[str, Shapes]]:
            words = set(arch.split(".")[0].split("_"))
            for other in timm.list_models():
                if len(words ^ set(other.split("_"))) == 1:
                    try:
                        shapes(0, other)
                    except ValueError:
                        continue
                    yield other, partial(shapes, arch=other)

        state, num_classes = fit(file, shapes, given.get("num_classes"), weights_key, variants)
        full["num_classes"] = num_classes
    # timm takes any file for a network with another number of classes, whatever it lacks: give it its own number.
    classes = full.pop("num_classes", None) if pretrained else None
    model = _create(name, arch, full, given, pretrained)
    if classes not in (None, model.num_classes):
        model.reset_classifier(classes)
    check_image_size(model, full.get("img_size"))
    if weights is not None or of_transformers:
        model.load_state_dict(state)
        if mapped:
            _map_parameters(model, state)
    for note in notes(name, given) if weights is not None or pretrained else ():
        warnings.warn(f"teacher.name {name}: {note}", stacklevel=2)
    return with_plain_blocks(model).eval()


def _map_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let a loaded model's parameters be the tensors of its file, where those are fp32 too."""
    for name, parameter in model.named_parameters():
        value = state[name]
        if value.dtype == parameter.dtype and value.is_contiguous():
            parameter.data = value


def notes(name: str, kwargs: Mapping[str, Any] | None = None) -> list[str]:
    """What timm notes of the weights behind a name, such as another activation that they want; see `build_backbone`."""
    arch, tag = _plain(name).partition(".")[::2]
    config = timm.get_pretrained_cfg(_plain(name), allow_unregistered=True) if timm.is_model(arch) else None
    found = list((config and config.notes) or ())
    for i, note in enumerate(found):
        if "quickgelu" in note.lower().replace("_", ""):
            if "quick" in str((kwargs or {}).get("act_layer", "")) or "quickgelu" in arch:
                found[i] = ""
            elif near := [n for n in timm.list_models("*quickgelu*") if n.replace("_quickgelu", "") == arch]:
                found[i] = f"{note}: {near[0]}{f'.{tag}' if tag else ''}"
    return [note for note in found if note]


def architecture(name: str, kwargs: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """What builds the same network as `name` and `kwargs` do, without asking the hub or a folder for its description.

    Returns:
        timm's own name and all overrides, of which `hf-hub:` and `local-dir:` models bring some of their own.
    """
    arch, full = _resolve(name, kwargs or {})
    return arch, {key: value for key, value in full.items() if key in (kwargs or {}) or key not in _DESCRIPTION}


def match_dtypes(model: nn.Module) -> None:
    """Give buffers that are joined with parameters the dtype of these; call it after parameters alone were cast.

    DeepSpeed casts so. timm's `EvaAttention` joins its key bias, a buffer of zeros, with the other biases: in fp32
    beside bf16 its softmax attention cannot run.
    """
    for module in model.modules():
        if isinstance(module, EvaAttention) and module.k_bias is not None:
            module.k_bias = module.k_bias.to(module.q_bias.dtype)


NOT_BUILT = (TypeError, ValueError, AssertionError, AttributeError, LookupError, ArithmeticError, RuntimeError)
LIKE = 0.7  # from this likeness on a name is offered for another
_DESCRIPTION = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args")
_ELSEWHERE = {
    "checkpoint_path": "give the file as teacher.weights",
    "pretrained": "say teacher.pretrained",
    "features_only": "leave it out: a ViT is converted, not a feature extractor",
}


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for overrides that timm takes, and that make something other than the network meant."""
    for key, remedy in _ELSEWHERE.items():
        if key in kwargs:
            raise ValueError(f"teacher.kwargs {key}: {remedy}")
    classes = kwargs.get("num_classes")
    if classes is not None and (not isinstance(classes, int) or classes < 0):
        raise ValueError(f"teacher.kwargs num_classes {classes!r}: a number of classes, or 0 for no head")


def _plain(name: str) -> str:
    """timm's own name of what the hub calls `timm/NAME`."""
    own = name.removeprefix("timm/")
    return own if own != name and timm.is_model(own.split(".")[0]) else name


def _resolve(name: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's own name and all that `timm.create_model` needs beside it.

    Raises:
        ValueError: there is no such model, tag or place (the nearest are named), or it cannot be had.
    """
    source, colon, place = name.partition(":")
    if source == "hf":
        described = describe_hf(place)
        cfg = {"pretrained_cfg_overlay": described.pretrained_cfg}
        return described.architecture, {**described.kwargs, **cfg, **kwargs}
    describe = {"hf-hub": load_model_config_from_hf, "local-dir": load_model_config_from_path}.get(source)
    if describe is not None:
        try:
            with hub_without_long_waits() if source == "hf-hub" else nullcontext():
                config, arch, own = describe(place)
        except OSError as error:
            if source == "local-dir":
                raise ValueError(f"teacher.name {name!r}: no such folder with a config.json of timm's") from error
            near = _nearest(place.removeprefix("timm/"), timm.list_models(pretrained=True)) if "timm/" in place else ""
            raise ValueError(f"{_not_from_the_hub(name, error)}{near.replace('but', 'or mean')}") from error
        except Exception as error:
            raise ValueError(f"teacher.name {name!r}: its config.json is not timm's ({one_line(error)})") from error
        if arch == "unsoftmax":
            raise ValueError(
                f"teacher.name {name!r}: an export, not a teacher; continue it as student.parent, or if its attention "
                "is softmax give it as teacher.weights"
            )
        if not timm.is_model(arch):
            raise ValueError(f"teacher.name {name!r}: describes {arch!r}, which this timm does not have")
        own = dict(own or {})
        return arch, {"pretrained_cfg": config, "pretrained_model_args": own, **own, **kwargs}
    plain = _plain(name)
    arch, _, tag = plain.partition(".")
    if colon or "/" in plain or "\\" in plain:
        if colon:
            near = difflib.get_close_matches(source, ("hf-hub", "hf", "local-dir"), 1, 0.3) or ["hf-hub"]
            said = f"a place is hf-hub:OWNER/NAME or local-dir:FOLDER, here perhaps {near[0]}:{place}"
        else:
            said = f"write hf-hub:{name} for a model on the hub, local-dir:{name} for a folder"
        raise ValueError(f"teacher.name {name!r}: timm has no such model; {said}")
    if not timm.is_model(arch):
        raise ValueError(f"teacher.name {name!r}: timm has no such model{_nearest(arch, timm.list_models())}")
    tags = [n.partition(".")[2] for n in timm.list_models(f"{arch}.*", include_tags=True)]
    if tag and tag not in tags:
        near = _nearest(tag, tags) or (f", but {', '.join(tags[:3])}" if tags else "; leave it out")
        raise ValueError(
            f"teacher.name {name!r}: timm cannot build it with weights {tag!r}, it has none so named{near}"
        )
    return plain, dict(kwargs)


def _nearest(word: str, words: Sequence[str]) -> str:
    """The words most like `word`, or that begin most like it, for the end of a message."""
    matcher = difflib.SequenceMatcher(b=word)

    def likeness(other: str) -> float:
        scores = []
        for part in (other, other[: len(word)]):
            matcher.set_seq1(part)
            scores.append(matcher.ratio() if matcher.real_quick_ratio() > LIKE else 0)
        return max(scores)

    scores = {other: likeness(other) for other in words}
    near = [other for other in sorted(words, key=scores.__getitem__, reverse=True)[:3] if scores[other] > LIKE]
    near = near or [other for other in words if word in other][:3]
    return f", but for example {', '.join(near)}" if near else ""


def _not_from_the_hub(name: str, error: Exception) -> str:
    return (
        f"teacher.name {name!r}: its weights cannot be had from the hub ({one_line(error)}); "
        "download them elsewhere and give the file with --teacher.weights FILE"
    )


def _create(
    name: str, arch: str, full: Mapping[str, Any], given: Mapping[str, Any], pretrained: bool = False
) -> nn.Module:
    """`timm.create_model`; raises ValueError in terms of what was `given` as `name` and overrides."""
    channels = full.get("in_chans", 3)
    if channels != 3:
        raise ValueError(f"teacher.kwargs in_chans {channels}: images have 3 channels here; leave it out")
    try:
        with hub_without_long_waits() if pretrained else nullcontext():
            model = timm.create_model(arch, pretrained=pretrained, **full)
    except Exception as error:
        if isinstance(error, NOT_BUILT) and not isinstance(error, OSError):
            why = f"{one_line(error)}{_meant(arch, error)}"
            said = f"teacher.name {name!r}: timm cannot build it with teacher.kwargs {dict(given)} ({why})"
        else:
            said = _not_from_the_hub(name, error)
        raise ValueError(said) from error
    channels = getattr(model, "in_chans", 3)
    if channels != 3:
        raise ValueError(f"teacher.name {name!r}: takes images of {channels} channels, and they have 3 here")
    return model


def _meant(arch: str, error: Exception) -> str:
    """The argument that a misspelt one was to be, from timm's own signatures."""
    wrong = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not wrong:
        return ""
    kind = getattr(sys.modules[timm.model_entrypoint(arch.split(".")[0]).__module__], wrong[1], None)
    near = difflib.get_close_matches(wrong[2], inspect.signature(kind).parameters if kind else (), 1)
    return f"; perhaps {near[0]} is meant" if near else ""


def check_image_size(
    model: nn.Module, image_size: int | Sequence[int] | None, setting: str = "data.image_size"
) -> None:
    """Raises ValueError when the patch size of `model` does not divide `image_size` (pixels), unless it pads."""
    patch_embed = getattr(model, "patch_embed", None)
    patch_size = getattr(patch_embed, "patch_size", None)
    if image_size is None or patch_size is None or getattr(patch_embed, "dynamic_img_pad", False):
        return
    if any(s % p for s, p in zip(pair(image_size), patch_size, strict=True)):
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
