"""What a run folder holds, at any moment: unfinished, damaged and missing parts are named, and never an error."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trainer.config import UserError, read_yaml, upgrade
from trainer.output.paths import is_complete, stage_path

TITLES = {
    "1": "attention alignment",
    "2": "feature alignment",
    "3": "supervised fine-tuning",
    "3 segmentation": "semantic segmentation",
}
Line = dict[str, Any]


@dataclass
class StageRecord:
    """What `RUN/stageN` holds."""

    stage: str
    path: Path
    problems: list[str] = field(default_factory=list)  # what is damaged, a line each

    def __post_init__(self) -> None:
        self.settings = self._settings()
        self.lines = self._lines("metrics.jsonl")
        self.starts = self._lines("starts.jsonl", "time")
        self.export = self._json("export/config.json")
        self.classes = self._of("classes.json", "classes")
        self.blocks = self._blocks()
        self.features = self._features()

    @property
    def begun(self) -> bool:
        """Whether anything of it is there."""
        return any((self.path / name).exists() for name in ("config.yaml", "metrics.jsonl", "export", "checkpoints"))

    @cached_property
    def complete(self) -> bool:
        """Whether it has its export."""
        return is_complete(self.path)

    @property
    def segments(self) -> bool:
        """Whether it is stage 3 on masks."""
        return self.stage == "3" and self.get("task") == "segmentation"

    @property
    def is_baseline(self) -> bool:
        """Whether its student keeps softmax attention throughout."""
        return self.get("student.attention") == "softmax"

    @property
    def title(self) -> str:
        """Its name in words."""
        return TITLES["3 segmentation" if self.segments else self.stage]

    def get(self, name: str, default: Any = None) -> Any:
        """A setting by its dotted name."""
        found: Any = self.settings
        for key in name.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return default if found is None else found

    def of_split(self, split: str) -> list[Line]:
        """The metrics lines of a split."""
        return [line for line in self.lines if line.get("split") == split]

    @property
    def first(self) -> Line:
        """The evaluation before the first step, or {}."""
        return next((line for line in self.of_split("val") if line["step"] == 0), {})

    @property
    def last(self) -> Line:
        """The newest evaluation after the first step, or {}."""
        return next((line for line in reversed(self.of_split("val")) if line["step"] > 0), {})

    @cached_property
    def progress(self) -> tuple[int, int | None]:
        """The newest step, and the last one where it is known."""
        step = max((line["step"] for line in self.lines), default=0)
        steps = next((s.get("steps") for s in reversed(self.starts) if isinstance(s.get("steps"), int)), None)
        return step, steps or self.get("train.steps")

    @property
    def state(self) -> str:
        """`done`, `unfinished` or `missing`."""
        return "done" if self.complete else "unfinished" if self.begun else "missing"

    def pictures(self) -> dict[str, Path]:
        """PNGs by name."""
        return {path.stem: path for path in sorted((self.path / "pictures").glob("*.png"))}

    @cached_property
    def parameters(self) -> dict[str, list[int]]:
        """Shapes of the export's weights by name; {} where there are none to read."""
        file = self.path / "export/model.safetensors"
        if not file.is_file():
            return {}
        try:
            with safe_open(file, "numpy") as weights:
                return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            self.problems.append(f"{file}: damaged ({error})")
            return {}

    def _settings(self) -> dict[str, Any]:
        path = self.path / "config.yaml"
        if not path.is_file():
            return {}
        try:
            return upgrade(read_yaml(path))
        except UserError as error:
            self.problems.append(str(error))
            return {}

    def _lines(self, name: str, key: str = "step") -> list[Line]:
        path, found, bad = self.path / name, [], 0
        try:
            texts = path.read_bytes().split(b"\n") if path.is_file() else []
        except OSError as error:
            self.problems.append(f"{path}: cannot be read ({error})")
            return []
        for text in filter(None, texts):
            try:
                line = json.loads(text)
                assert isinstance(line, dict) and type(line["step"]) is int and key in line
                found.append(line)
            except (ValueError, KeyError, RecursionError, AssertionError):
                bad += 1
        if bad:
            self.problems.append(f"{path}: {bad} of its lines {'is' if bad == 1 else 'are'} damaged and left out")
        return found

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name, self.problems)

    def _of(self, name: str, key: str) -> dict[str, dict[str, Any]]:
        part = self._json(name).get(key)
        return {k: v for k, v in part.items() if isinstance(v, dict)} if isinstance(part, dict) else {}

    def _blocks(self) -> dict[str, Any]:
        found = self._json("blocks.json")
        try:
            [float(x) for x in found["alone"]], [(int(e["block"]), float(e["damage"])) for e in found["order"]]
            return found if all(isinstance(i, int) for i in found["softmax"]) else {}
        except (KeyError, TypeError, ValueError):
            if found:
                self.problems.append(f"{self.path / 'blocks.json'}: is not a ranking of blocks")
            return {}

    def _features(self) -> list[dict[str, Any]]:
        rows = self._json("pictures/features.json").get("rows")
        try:
            return [
                row for row in rows or () if all(len(box) == 4 for box in row["tiles"].values()) and row["cosine"] < 2
            ]
        except (KeyError, TypeError, AttributeError):
            self.problems.append(f"{self.path / 'pictures/features.json'}: damaged")
            return []


@dataclass
class RunRecord:
    """What a run folder holds."""

    path: Path
    name: str
    baseline: "RunRecord | None" = None  # another run of the same page, whose student kept softmax attention

    def __post_init__(self) -> None:
        self.stages = [StageRecord(stage, stage_path(self.path, stage)) for stage in ("1", "2", "3")]
        self._problems: list[str] = []
        self.probe = read_json(stage_path(self.path, "probe") / "results.json", self._problems)
        self.evaluation = read_json(self.path / "evaluate/results.json", self._problems)

    @property
    def begun(self) -> list[StageRecord]:
        """The stages of which anything is there."""
        return [stage for stage in self.stages if stage.begun]

    @property
    def problems(self) -> list[str]:
        """What is damaged, a line each."""
        return [*(line for stage in self.stages for line in stage.problems), *self._problems]


def read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; {} where there is none, or with a line in `problems` where it is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        problems.append(f"{path}: is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: damaged ({error})")
    return {}


def number(line: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a line; None where it has none of that name."""
    value = line.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
