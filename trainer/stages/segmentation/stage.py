"""Stage 3 for semantic segmentation: a head on the backbone's patch features, trained on masks."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import models
from models import IGNORE, Segmenter, ViT, build_head
from trainer.config import Settings, UserError
from trainer.engine.engine import DeepSpeedEngine
from trainer.engine.optim import scaled
from trainer.output.folder import StageFolder
from trainer.ranks.world import dist
from trainer.stages.base import Batch, ForwardOutputs, Infos, trainable_parameters
from trainer.stages.blockwise import kept_on
from trainer.stages.classes import check_same_classes
from trainer.stages.finetune.stage import Supervised, set_drop_path
from trainer.stages.keyed import draw_paths
from trainer.stages.segmentation.masks import Shown, draw_masks
from trainer.stages.segmentation.metrics import class_iou, confusion, scores
from trainer.stages.segmentation.views import Views

SHOWN = 8  # images in a picture, at most
PIXELS = 2**27  # values of class probabilities held at once in evaluation: half a GiB in fp32


class Segmentation(Supervised):
    """The head's own loss on masks; evaluated at the images' own size by the mean intersection over union."""

    name = "semantic segmentation"
    scored = "miou"
    compares = False
    worst: list[tuple[float, int, Shown]] | None = None  # (IoU, index, image) of the last evaluation
    first: list[tuple[int, int, Shown]]

    @classmethod
    def check(cls, settings: Settings, infos: Infos, micro_batch_size: int) -> None:
        """Masks there must be, of the same classes; and `segmentation.beside` must segment into as many."""
        super().check(settings, infos, micro_batch_size)
        train = infos["train"]
        for split, info in infos.items():
            if not info.has_masks or info.mask_classes is None:
                what = (
                    "has no JSON beside it, which names the classes of its masks" if info.has_masks else "has no masks"
                )
                how = "write it with python -m data.write --task segmentation"
                raise UserError(f"data.{split} {info.path}: {what}; {how}")
            check_same_classes(train, info, f"data.{split}")
        if settings.stage3.num_classes not in (None, len(train.mask_classes)):
            raise UserError(
                f"stage3.num_classes {settings.stage3.num_classes}: data.train has {len(train.mask_classes)} classes; "
                "leave it out"
            )
        beside = settings.segmentation.beside
        if beside is not None:
            theirs = models.read_config(beside).get("segmentation", {}).get("num_classes")
            if theirs != len(train.mask_classes):
                what = f"has {theirs} classes, the data has {len(train.mask_classes)}"
                what = "does not segment" if theirs is None else what
                raise UserError(
                    f"segmentation.beside {beside}: {what}; give the export of another segmentation, or none"
                )

    @classmethod
    def head_classes(cls, settings: Settings, infos: Infos, student: nn.Module) -> int:
        """Those of the masks."""
        return len(infos["train"].mask_classes)

    @classmethod
    def train_loader(cls, settings: Settings, path: Path, **how: Any) -> data.Loader:
        """Images and masks, by segmentation's recipe."""
        given = settings.data
        return data.train_loader(
            path, masks=True, resize=tuple(given.resize), hflip=given.hflip, max_share=given.max_share,
            photometric=given.photometric, **how,
        )  # fmt: skip

    @classmethod
    def eval_loader(cls, settings: Settings, path: Path, **how: Any) -> data.Loader:
        """Images and masks at their own size."""
        return data.original_loader(path, **{key: value for key, value in how.items() if key != "image_size"})

    def wrap(self, student: ViT) -> nn.Module:
        """The student with a new head in its classifier's place."""
        options = self.settings.segmentation
        head = build_head(options.head, student.embed_dim, self.num_classes, **options.kwargs)
        return Segmenter(student, head)

    def prepare(self) -> None:
        """Drop path, checkpointing and compilation of the backbone."""
        self.paths = set_drop_path(self.student.backbone, self.settings.stage3.drop_path)
        self.save_memory_and_time(self.student.backbone)

    def selected(self, which: str) -> list[nn.Parameter]:
        """What `which` says of the backbone (`head`: none of it); the head, being new, always."""
        return [*trainable_parameters(self.student.backbone, which), *self.student.head.parameters()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """With `segmentation.head_lr` as the factor on the head's learning rate."""
        groups, factor = super().parameter_groups(), self.settings.segmentation.head_lr
        return groups if factor == 1 else scaled(groups, self.student.head.parameters(), factor)

    def losses(self, batch: Batch, outputs: ForwardOutputs) -> dict[str, Tensor]:
        """{"loss": [B], **parts}."""
        draw_paths(self.paths, batch["key"])
        values = self.student(batch["image"], batch["mask"])
        return kept_on(self, outputs, values, self.settings.stage3.attention_weight)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Training: {"loss": scalar, **parts}. Evaluation: {"logits": [B, C, H, W]}."""
        return super().forward(batch) if self.training else {"logits": self.student(batch["image"])}

    def score(self, values: dict[str, float]) -> float:
        """The mean intersection over union."""
        return values["miou"]

    def evaluate(self, engine: DeepSpeedEngine, batches: Iterable[Batch]) -> dict[str, float]:
        """`loss`, and the `scores` of one confusion matrix over all images, each once, at the images' own size.

        The loss is cross-entropy of the mean over all views, as `Head.loss` counts pixels.
        """
        classes = self.num_classes
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=engine.device)
        loss = torch.zeros(2, dtype=torch.float64, device=engine.device)  # sum, images
        self.worst, self.first = [], []
        with self.evaluation_mode(engine):
            for batch in batches:
                for index, image, truth, chance in self.predictions(engine, batch):
                    found = chance.argmax(1)
                    counts = confusion(found, truth, classes)
                    known = truth != IGNORE
                    own = chance.gather(1, (truth * known).long()[:, None])[:, 0].clamp_min(1e-12)
                    nats = (-own.log() * known).mean((1, 2))
                    matrix += counts.sum(0)
                    loss += torch.stack([nats.double().sum(), nats.new_tensor(len(nats))])
                    self.keep(index, class_iou(counts).nanmean(-1), image, truth, found)
        dist.all_reduce(matrix)
        dist.all_reduce(loss)
        self.record(engine, matrix)
        return {"loss": (loss[0] / loss[1]).item(), **scores(matrix), "images": int(loss[1])}

    def keep(self, index_B: Tensor, iou_B: Tensor, image: Tensor, truth: Tensor, found: Tensor) -> None:
        """Keep the worst images and the first ones for pictures."""
        for row, (index, iou) in enumerate(zip(index_B.tolist(), iou_B.tolist(), strict=True)):
            for kept, place in ((self.worst, iou), (self.first, index)):
                if place == place and (len(kept) < SHOWN or (place, index) < kept[-1][:2]):  # no label: IoU is NaN
                    parts = (part[row].to("cpu", kind, copy=True) for part, kind in
                             ((image, torch.float16), (truth, torch.uint8), (found, torch.uint8)))  # fmt: skip
                    kept.append((place, index, Shown(index, iou, *parts)))
                    kept.sort(key=lambda entry: entry[:2])
                    del kept[SHOWN:]

    def record(self, engine: DeepSpeedEngine, matrix: Tensor) -> None:
        """`classes.json` in the stage's folder: each class's IoU (percent), its pixels, and those given to it."""
        if dist.get_rank() != 0:
            return
        columns = (100 * class_iou(matrix)).tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist()
        classes = {
            name: {"iou": None if iou != iou else iou, "pixels": truth, "predicted": found}
            for name, iou, truth, found in zip(self.infos["train"].mask_classes, *columns, strict=True)
        }
        path = StageFolder(self.settings).path / "classes.json"
        path.write_text(json.dumps({"step": engine.global_steps, "classes": classes}, indent=1) + "\n")

    def draw(self, engine: DeepSpeedEngine, loader: data.Loader | None, folder: Path) -> None:
        """`worst.png` and `first.png`: images, truth and masks; `segmentation.beside` has one more column."""
        if loader is None:
            return
        if self.worst is None:  # evaluated by the process before this one
            self.evaluate(engine, loader.epoch())
        shown = {}
        for name, mine in (("worst", self.worst), ("first", self.first)):
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, [entry[:2] for entry in mine])
            chosen = set(sorted(place for theirs in everyone for place in theirs)[:SHOWN])
            dist.all_gather_object(everyone, [entry for entry in mine if entry[:2] in chosen])
            ordered = sorted((entry for theirs in everyone for entry in theirs), key=lambda entry: entry[:2])
            shown[name] = [entry[2] for entry in ordered]
        if dist.get_rank() != 0:
            return
        other = self.settings.segmentation.beside
        other = None if other is None else models.load(other).to(engine.device)
        info = self.infos["train"]
        for name, rows in shown.items():
            masks = {"truth": [row.truth for row in rows], _attention(self.student): [row.found for row in rows]}
            if other is not None:
                masks[f"{_attention(other)} beside"] = [self.masks_of(other, row.image) for row in rows]
            titles = [f"{row.index}: IoU {100 * row.iou:.1f}" for row in rows]
            images = [loader.pixels(row.image.to(engine.device)).cpu() for row in rows]
            draw_masks(folder / f"{name}.png", images, masks, titles, info.mask_classes, info.palette)

    @torch.no_grad()
    def masks_of(self, model: nn.Module, image: Tensor) -> Tensor:
        """uint8 [H, W] of an image [3, H, W] as this stage's evaluation looks at it."""
        views = Views.of(self.settings, model.backbone.patch_embed.img_size, 1)
        chance = views.probabilities(model, image.to(next(model.parameters()).device, torch.float32)[None])
        return chance.argmax(1)[0].to("cpu", torch.uint8)

    def predictions(self, engine: DeepSpeedEngine, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of a batch's images that count: index [b], image, truth [b, H, W] and class probabilities [b, C, H, W].

        All ranks call the model equally often, whatever the sizes of their images: ZeRO 3 gathers weights as it runs.
        """
        window = self.student.backbone.patch_embed.img_size
        views = Views.of(self.settings, window, engine.train_micro_batch_size_per_gpu())
        dtype = next(self.parameters()).dtype

        def model(image: Tensor) -> Tensor:
            return engine({"image": image.to(dtype)})["logits"]

        size, valid = tuple(batch["image"].shape[-2:]), batch["valid"]
        image, mask, index = (batch[key][valid] for key in ("image", "mask", "index"))
        at_once = max(1, PIXELS // (self.num_classes * size[0] * size[1]))
        parts = [slice(at, at + at_once) for at in range(0, len(image), at_once)]
        calls = sum(views.calls(len(image[part]), size) for part in parts)
        most = torch.tensor(calls, device=engine.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        for part in parts:
            yield index[part], image[part], mask[part], views.probabilities(model, image[part])
        for _ in range(most.item() - calls):
            model(batch["image"][:1, :, : views.window[0], : views.window[1]])

    def export_config(self) -> dict[str, Any]:
        """The head, and the classes with their colours."""
        options, info = self.settings.segmentation, self.infos["train"]
        of_head = {"head": options.head, "num_classes": self.num_classes, "kwargs": options.kwargs}
        return {"segmentation": of_head, "classes": info.mask_classes, "palette": info.palette}


def _attention(model: nn.Module) -> str:
    return "linear" if models.linear_blocks(models.backbone_of(model)) else "softmax"
