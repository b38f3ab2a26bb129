"""Settings of what a stage runs on: the teacher, the student and the images."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from trainer.fields import (
    Auto,
    BelowOne,
    Count,
    Fraction,
    Interval,
    OptionalPath,
    PathName,
    Probability,
    Shares,
    checked,
)
from trainer.setup.resolution import ImageSize, Resolutions

Mean = checked(list[float], "three values (R, G, B)", lambda v: len(v) == 3)
Std = checked(list[float], "three values (R, G, B) above 0", lambda v: len(v) == 3 and min(v) > 0)


@dataclass
class Teacher:
    """The softmax ViT that is converted."""

    free: ClassVar = frozenset({"weights", "shard"})  # the first is compared by what it holds

    name: str | None = None
    """timm's name, with or without a pretrained tag; or hf:OWNER/NAME or hf:FOLDER, a checkpoint of transformers."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Architecture overrides for timm.create_model."""
    weights: OptionalPath = None
    """A local file of weights, or the folder of a softmax export; by default they come from the hub."""
    weights_key: str | None = None
    """Which network of the file is meant, where several fit, such as teacher.backbone."""
    pretrained: bool = True
    """Whether to load weights; false leaves them random, which only stage 3, a dry run and an evaluation accept."""
    shard: bool = False
    """Spread the frozen teacher over the ranks as ZeRO 3 does, for one too large for each GPU; it sends more."""

    def resolve(self, settings: Any) -> None:
        """Raises ValueError where a sharded teacher cannot be used."""
        if self.shard and settings.train.compile:
            raise ValueError("teacher.shard: does not work with train.compile; leave one of them off")
        if self.shard and isinstance(settings.student.keep_softmax, str):
            raise ValueError(
                f"teacher.shard: student.keep_softmax {settings.student.keep_softmax} measures with a whole teacher; "
                "name the blocks"
            )


@dataclass
class Student:
    """What the teacher is turned into."""

    free: ClassVar = frozenset({"parent"})  # compared by what it holds

    attention: Literal["linear", "softmax"] = "linear"
    """The kind of attention; softmax is the baseline of stage 3."""
    operator: str = "elu1"
    """What replaces softmax (a feature map, mostly): a name from models.OPERATORS."""
    operator_kwargs: dict[str, Any] = field(default_factory=dict)
    """The operator's own keywords, such as {power: 6}."""
    additions: list[str] = field(default_factory=list)
    """What is added to the operator: names from models.ADDITIONS, such as [value_conv5]."""
    keep_softmax: list[int] | Auto = field(default_factory=list)
    """Blocks that keep softmax attention; auto:2 chooses two by what the final tokens lose without them."""
    trainable: Literal["qkv", "attention", "backbone", "head", "all"] | None = None
    """Parameters that train: qkv has the operator's own too; by default qkv in stage 1, backbone in 2, all in 3."""
    parent: PathName | None = None
    """The export to start from, or none for the teacher's weights; by default the previous stage's of the run."""

    def resolve(self, settings: Any) -> None:
        """Raises ValueError when `parent` is given to what starts from the teacher's weights."""
        starts = {"1": "stage 1", "3": "student.attention softmax" if self.attention == "softmax" else ""}
        if self.parent not in (None, "none") and (what := starts.get(settings.stage)):
            raise ValueError(f"student.parent {self.parent}: {what} starts from the teacher's weights; leave it out")


@dataclass
class Data:
    """Images: .beton files, or what is written as such into a cache first."""

    # The files are compared by what they hold.
    free: ClassVar = frozenset({"workers", "train", "val", "val_share", "max_side", "cache"})

    train: OptionalPath = None
    """Images to train on: a folder, Parquet or WebDataset shards, hf:OWNER/NAME; a .beton file; digits is embedded."""
    val: OptionalPath = None
    """Images to evaluate on, likewise; by default the val split of such images, or a held-out share of them."""
    val_share: BelowOne = 0.1
    """Share of each class that is held out to evaluate on, where images are given without any of a val split."""
    max_side: Count | None = 1024
    """Pixels to which a longer side is shrunk when images are written; at least data.image_size."""
    cache: OptionalPath = None
    """Folder of the .beton files that are written of images; by default ~/.cache/unsoftmax/images."""
    image_size: ImageSize | None = None
    """Pixels: a side, or [height, width]; by default the teacher's."""
    resolutions: Resolutions = field(default_factory=list)
    """Sizes before image_size, each with its share of the steps: ["224:0.8"]."""
    mean: Mean | None = None
    """Mean of R, G and B, of pixels in 0..1; by default the teacher's."""
    std: Std | None = None
    """Standard deviation of R, G and B, of pixels in 0..1; by default the teacher's."""
    crop_pct: Fraction = 1.0
    """Share of the shorter side that the evaluation's centre crop keeps."""
    scale: Shares = field(default_factory=lambda: [0.25, 1.0])
    """Area of the random resized crop, as a share of the image."""
    ratio: Interval = field(default_factory=lambda: [0.75, 1.3333])
    """Aspect ratio of the random resized crop."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    resize: Interval = field(default_factory=lambda: [0.5, 2.0])
    """Segmentation: random scale before the crop; 1 makes the shorter side image_size."""
    max_share: Fraction = 0.75
    """Segmentation: largest share of one class in a crop; above it another crop is drawn."""
    photometric: bool = True
    """Segmentation: random brightness, contrast, saturation and hue."""
    order: Literal["auto", "random", "windowed"] = "auto"
    """Reading order: windowed reads in long runs; auto takes it for files above 2/3 of memory."""
    window: Count | None = None
    """MiB that the windowed order shuffles together, over all ranks; by default 2048, or 1/4 of memory."""
    workers: Count | None = None
    """Decoding threads per rank; by default its share of the cores."""

    def resolve(self, settings: Any) -> None:
        """Raises ValueError when mean or std are of pixels in 0..255."""
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given and max(map(abs, given)) > 1:
                meant = [round(value / 255, 4) for value in given]
                raise ValueError(
                    f"data.{name} {given}: is of pixels in 0..255; pixels are in 0..1 here, so give {meant}"
                )
