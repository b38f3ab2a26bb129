"""What the models give of each image, in one pass: features, best classes, and how near they are to the teacher's."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from models.taps import pooled
from trainer.evaluate.subjects import Subject
from trainer.probe.store import Array

BEST = 5  # classes per image that are kept
WHAT = ("features", "head", "zero_shot", "cosine")
NEEDS = {
    "knn": ("features",),
    "probe": ("features",),
    "head": ("head",),
    "zero_shot": ("zero_shot",),
    "agreement": WHAT,
}  # measure -> what it reads
Key = tuple[str, str, str]  # model, what, kind: see `Array`


class Outputs:
    """Reads a batch of images through all models. The features are kept as `probe.features.Reader` keeps them."""

    def __init__(
        self, subjects: dict[str, Subject], pooling: Collection[str], image_size: tuple[int, int],
        class_embeddings: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Looks at one empty image.

        Args:
            pooling: see `evaluate.pooling`. A model without prefix tokens has its mean token alone.
            class_embeddings: [classes, width], of models whose output has that width.
        """
        self.subjects, self.pooling, self.embeddings = subjects, pooling, class_embeddings
        self.widths: dict[str, int] = {}  # of the models' own outputs
        self.kept: Collection[str] = WHAT
        one = self.read(torch.zeros(1, 3, *image_size))
        self.arrays = [Array(*key, x.shape[-1]) for key, x in one.items()]

    def keep(self, measures: Collection[str]) -> None:
        """Read from now on what these measures need."""
        self.kept = {what for measure in measures for what in NEEDS.get(measure, ())}
        self.arrays = [array for array in self.arrays if array.tap in self.kept]

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @torch.no_grad()
    def read(self, image: Tensor) -> dict[Key, Tensor]:
        """[B, 3, H, W] -> fp32 [B, width] each.

        (model, `features`, how they are pooled); (model, `head` or `zero_shot`, `best`), the best classes, first ones
        first; (model, `cosine`, `all`, `patches` or `prefix`), the mean cosine of its tokens to the teacher's.
        """
        found: dict[Key, Tensor] = {}
        of_teacher = None
        for name, subject in self.subjects.items():
            net = subject.net
            tokens = net.forward_features(subject.seen(image))
            read = features(net, tokens)
            for kind in dict.fromkeys(kind for pool in self.pooling for kind in parts_of(pool)):
                if kind in read:
                    found[name, "features", kind] = read[kind]
            if subject.classes:
                found[name, "head", "best"] = best(net.forward_head(tokens).float(), subject.classes)
            if self.embeddings is not None:
                output = net.forward_head(tokens).float()
                self.widths[name] = output.shape[-1]
                if output.ndim == 2 and output.shape[-1] == self.embeddings.shape[-1]:
                    scores = F.normalize(output, dim=-1) @ F.normalize(self.embeddings.to(output), dim=-1).mT
                    found[name, "zero_shot", "best"] = best(scores, len(self.embeddings))
            if name == "teacher":
                of_teacher = tokens
            elif of_teacher is not None and tokens.shape == of_teacher.shape and tokens.ndim == 3:
                found |= {(name, "cosine", kind): x for kind, x in cosines(net, tokens, of_teacher).items()}
        return {key: x for key, x in found.items() if key[1] in self.kept}


def best(scores: Tensor, classes: int) -> Tensor:
    """[B, C] -> the best classes [B, 5 or fewer], as fp32: whole numbers of that size stay exact."""
    return scores.topk(min(BEST, classes)).indices.float()


def parts_of(pool: str) -> tuple[str, ...]:
    """The vectors that a pooling joins."""
    return ("prefix", "mean") if pool == "both" else (pool,)


def features(net: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """`pooled`, what the model's classifier reads; of a ViT `mean` and, where there is one, `prefix`: [B, *] fp32."""
    head = net.forward_head(tokens, pre_logits=True)
    read = {}
    if tokens.ndim == 3 and getattr(net, "num_prefix_tokens", None) is not None:
        read["mean"] = pooled(tokens, "mean")
        if net.num_prefix_tokens:
            read["prefix"] = pooled(tokens, "prefix")
    if head.ndim == 2:
        read["pooled"] = head.float()
    else:  # the head was removed with all that pools for it, as of a Segmenter
        read["pooled"] = read.get("prefix", read["mean"])
    return read


def cosines(net: nn.Module, tokens: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Mean cosines of tokens [B, N, D] to others, [B, 1] each: over all of them, the patches, the prefix tokens."""
    values, prefix = F.cosine_similarity(tokens.float(), target.float(), dim=-1), net.num_prefix_tokens
    parts = {"all": values, "patches": values[:, prefix:]} | ({"prefix": values[:, :prefix]} if prefix else {})
    return {kind: x.mean(-1, keepdim=True) for kind, x in parts.items()}


def class_embeddings(path: str, classes: list[str] | None, count: int) -> Tensor:
    """fp32 [classes, width] from a file of weights: one tensor, or one per class by its name.

    Args:
        classes: names in the order of the labels, where they are known.
        count: how many classes the images have.

    Raises:
        ValueError, OSError: it cannot be read, or is of other classes.
    """
    state, where = models.read_weights(path), f"evaluate.class_embeddings {path}"
    if len(state) == 1:
        (found,) = state.values()
        if found.ndim != 2:
            raise ValueError(f"{where}: has a tensor {list(found.shape)}; it must be [classes, width]")
    else:
        missing = [name for name in classes or () if name not in state]
        if classes is None or missing:
            what = f"has none for {missing[0]!r}" if missing else "data.val has no names of classes to find them by"
            raise ValueError(f"{where}: {what}; give one tensor [classes, width], or one [width] per class by its name")
        rows = [state[name] for name in classes]
        if any(row.ndim != 1 or row.shape != rows[0].shape for row in rows):
            raise ValueError(f"{where}: its tensors must be of one shape, [width]")
        found = torch.stack(rows)
    if len(found) != count:
        raise ValueError(f"{where}: has {len(found)} classes, data.val {count}")
    models.check_finite({"class_embeddings": found}, path)
    return found.float()
