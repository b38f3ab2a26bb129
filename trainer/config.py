"""All settings: the recipe's YAML first, then the command line. What is not understood is an error.

Each group of settings stands beside what it sets, in the `settings.py` of its room, which imports nothing heavy: a
mistake is answered before torch is imported. A recipe's section `stages` holds what differs per stage.
"""

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from trainer.engine.settings import Train
from trainer.fields import PathName, words
from trainer.output.paths import is_begun, is_complete, stage_path
from trainer.output.settings import Tracking, Wandb
from trainer.setup.settings import Data, Student, Teacher
from trainer.stages import STAGES

RECIPES = Path(__file__).parent / "recipes"
set_parsing_settings(docstring_parse_attribute_docstrings=True)

DESCRIPTION = (
    "Convert a softmax ViT into a linear-attention one, a stage per run. Stages: 1, attention alignment; 2, feature "
    "alignment; 3, supervised fine-tuning; probe, linear probes on every module; evaluate, a verdict on a model; all, "
    "what is missing of 1, 2 and 3."
)
TASKS = tuple(task for tasks in STAGES.values() if isinstance(tasks, dict) for task in tasks)


class UserError(Exception):
    """A user's mistake: one line that says what, where and how to mend it. The program ends with status 2."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Within it a ValueError is a user's mistake: `models` and `data` know no other word for one."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def _room(place: str) -> dict[str, type]:
    """The groups of settings of a stage, by their names: none where no `settings.py` lies beside it."""
    name = f"{place.rpartition('.')[0]}.settings"
    return import_module(name).SETTINGS if find_spec(name) else {}


def _places() -> Iterator[str]:
    for place in STAGES.values():
        yield from place.values() if isinstance(place, dict) else (place,)


@dataclass
class Common:
    """The settings that all stages share."""

    stage: Literal[tuple(STAGES)]
    """1 attention alignment, 2 feature alignment, 3 supervised fine-tuning; probe; evaluate; all: 1, 2 and 3."""
    task: Literal[TASKS] = TASKS[0]
    """What stage 3 learns."""
    run: PathName | None = None
    """The run folder; by default runs/<recipe>."""
    deepspeed: PathName = str(Path("ds_configs") / "zero1.json")
    """DeepSpeed's JSON file."""
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    wandb: Wandb = field(default_factory=Wandb)
    tracking: Tracking = field(default_factory=lambda: ["wandb"])
    """Where metrics and pictures go beside the run folder; [] for nowhere."""
    dry_run: bool = False
    """Show what would run, without training."""

    # Set by `parse`: the file whose settings came first, and where that is the run's own, what was typed beyond it.
    source: ClassVar[str] = ""
    changed: ClassVar[tuple[str, ...]] = ()
    # Set by `parse`: the arguments.
    typed: ClassVar[tuple[str, ...]] = ()
    # Set by `trainer.setup.prepare`: the .beton files that were written of images, by "train" and "val".
    files: ClassVar[dict[str, Path] | None] = None


OF_STAGES = {name: kind for place in _places() for name, kind in _room(place).items()}
Settings = dataclasses.make_dataclass(
    "Settings", [(name, kind, field(default_factory=kind)) for name, kind in OF_STAGES.items()], bases=(Common,)
)
Settings.__doc__ = "All settings of one stage's run: `Common`, and the groups of every stage."

# May change between a run and its continuation: they alter nothing of what is learned. So may the `free` of a group.
FREE = {"run", "dry_run", "deepspeed", "wandb", "tracking", "evaluate"}


def place_of(settings: Common) -> str:
    """The entry of `STAGES` that the settings ask for."""
    found = STAGES[settings.stage]
    return found[settings.task] if isinstance(found, dict) else found


def stage_of(settings: Common) -> Any:
    """What runs the stage: a subclass of `trainer.stages.base.Stage`, or a module with `run` and `check`."""
    return resolve_name(place_of(settings))


class _HelpFormatter(DefaultHelpFormatter):
    def _get_type_str(self, action: argparse.Action) -> str | None:
        kind = getattr(action, "_typehint", None)
        return super()._get_type_str(action) if kind is None else words(kind)


class Parser(ArgumentParser):
    """jsonargparse's. A mistake is a UserError of one line. `kind` is the dataclass whose fields it reads."""

    kind: type = Settings

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.add_class_arguments(self.kind, as_group=False)

    def error(self, message: str, ex: Exception | None = None) -> None:
        message = " ".join(message.split())
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            message = f"{unknown[1]}: {no_such(unknown[1].lstrip('-'), self.kind)}"
        elif wrong := re.fullmatch(r'Parser key "([\w.]+)": .*(?:Got|Given) value: (.*)', message):
            kind = dict(names(self.kind)).get(wrong[1])
            message = f"{wrong[1]} {wrong[2]}: must be {words(kind)}"
        raise UserError(message)


def names(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("train.lr", float) and so on, all settings of a dataclass."""
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            yield from names(f.type, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f.type


def explained(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """("train.lr", "Peak learning rate ...") and so on: the sentence that stands beside each setting."""
    from docstring_parser import parse_from_object

    said = {
        entry.args[-1]: entry.description for base in kind.__mro__[-2::-1] for entry in parse_from_object(base).meta
    }
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            yield from explained(f.type, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", said.get(f.name) or ""


def no_such(name: str, kind: type = Settings) -> str:
    """ "no such setting", with its name of now, or the nearest one: by name, else by the words of its explanation."""
    if kind is Settings and name in RENAMED:
        return f"its name is now {RENAMED[name][0]}; --print_config shows all"
    known = list(dict.fromkeys(part for full, _ in names(kind) for part in (full, full.split(".")[0]) if part != name))
    group, _, last = name.rpartition(".")
    asked = last.lower().split("_")
    near = [full for full in known if full.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, known, 1, 0.85)
    near = near or [
        full for full, text in explained(kind) if full.startswith(group) and all(word in text.lower() for word in asked)
    ]
    near = near or difflib.get_close_matches(name, known, 1)
    hint, all_of = f"did you mean {near[0]}? " if near else "", "--print_config" if kind is Settings else "--help"
    return f"no such setting; {hint}{all_of} shows all"


def parse(argv: list[str] | None = None) -> Settings:
    """Settings from a recipe and the command line.

    Raises:
        UserError: unknown or unfit setting, no such recipe.
    """
    argv = [arg for arg in (sys.argv[1:] if argv is None else argv) if not arg.startswith("--local_rank")]
    argv = ["--dry_run=true" if arg == "--dry_run" else arg for arg in argv]
    for option in ("--probe.test", "--evaluate.beside"):
        argv = gather(argv, option)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("config", "stage", "task", "run", "teacher.name", "data.train", "student.parent"):
        peek.add_argument(f"--{option}", dest=option.replace(".", "_"))
    try:
        typed, _ = peek.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    parser = Parser(
        prog="trainer/run.py",
        usage="%(prog)s --stage STAGE [--config RECIPE] [--run DIR] [--GROUP.SETTING VALUE ...]",
        description=DESCRIPTION,
        print_config="--print_config",
    )
    parser.add_argument("--config", help="A recipe: a YAML file, or the name of one in trainer/recipes.")
    parser.add_argument("--recipe", action="config", help=argparse.SUPPRESS)
    if any(arg in ("-h", "--help") for arg in argv):
        parser.print_help()
        raise SystemExit(0)
    if typed.stage is None:
        raise UserError(f"--stage: which stage is missing; give --stage with {words(Literal[tuple(STAGES)])}, or all")
    if typed.stage == "evaluate" and typed.run is None:
        typed.run = run_of(typed.student_parent)
    source = find_source(typed)
    recipe = read_recipe(source, typed.stage, typed.task)
    if typed.teacher_name:
        recipe = merge(recipe, {"teacher": {"name": typed.teacher_name}})
    if brings_validation(typed.data_train) and typed.data_train != (recipe.get("data") or {}).get("train"):
        recipe = merge(recipe, {"data": {"val": None}})
    as_recipe = [f"--recipe={yaml.safe_dump(recipe)}"]
    settings = _build(Settings, parser.parse_args([*as_recipe, *argv]))
    settings.run = settings.run or typed.run or str(Path("runs") / source.stem)
    settings.source, settings.typed = str(source), tuple(argv)
    if source.is_relative_to(Path(settings.run)):
        begun = as_dict(_build(Settings, parser.parse_args([*as_recipe, "--stage", typed.stage])))
        settings.changed = differences(begun, as_dict(settings))
    _resolve(settings)
    return settings


def brings_validation(train: str | None) -> bool:
    """Whether these are images in place of a .beton file: a recipe's data.val belongs to other images."""
    return train not in (None, "digits") and (
        train.startswith("hf:") or Path(train).suffix in (".parquet", ".tar") or Path(train).expanduser().is_dir()
    )


def find_source(typed: argparse.Namespace) -> Path:
    """The file whose settings come first: what a run was begun with, or a recipe.

    A stage that goes on takes its own `config.yaml`, and a later stage of a run the run's `recipe.yaml`, unless
    another `--config` is given. An evaluation, which is made anew each time, takes the run's. Without any the recipe is
    `default`; for another teacher, or an export that is evaluated by itself, it is `own`.
    """
    if typed.config is not None:
        return find_recipe(typed.config)
    if typed.run is not None and typed.stage in STAGES:
        run = Path(typed.run).expanduser()
        stage = stage_path(run, typed.stage)
        begun = (stage / "config.yaml").is_file() and (is_begun(stage) or is_complete(stage))
        if begun and typed.stage != "evaluate":
            return stage / "config.yaml"
        if (run / "recipe.yaml").is_file():
            return run / "recipe.yaml"
    judged = typed.stage == "evaluate" and typed.student_parent not in (None, "none")
    return find_recipe("own" if typed.teacher_name or judged else "default")


def run_of(export: str | None) -> str | None:
    """The run folder that a stage's export lies in, or None."""
    run = Path(export or "").expanduser().parent.parent
    return str(run) if export and (run / "recipe.yaml").is_file() else None


def gather(argv: list[str], option: str) -> list[str]:
    """`option A B ... option C` -> `option=["A", "B", "C"]`: the parser takes a list as one value."""
    values, rest, taking = [], [], False
    for arg in argv:
        taking = arg == option or (taking and not arg.startswith("-"))
        if not taking:
            rest.append(arg)
        elif arg != option:
            values.append(arg)
    return [*rest, f"{option}={json.dumps(values)}"] if values else argv


def of_later_stage(argv: list[str]) -> list[str]:
    """The arguments of a chain for a stage after its first: `student.parent` is what the first starts from."""
    option = "--student.parent"
    pairs = zip(["", *argv], argv, strict=False)
    return [arg for before, arg in pairs if option not in (before, arg) and not arg.startswith(f"{option}=")]


class _TwiceError(yaml.constructor.ConstructorError):
    """A key that stands twice."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice; also 2 beside "2"."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[str, yaml.Node] = {}
    for key, _ in node.value:
        name = str(loader.construct_object(key, deep=True)) if key.tag != "tag:yaml.org,2002:merge" else "<<"
        if name in seen:
            raise _TwiceError(None, None, f"{name} stands twice", key.start_mark)
        seen[name] = key
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path, plain: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        plain: take all values as they are written, as text.

    Raises:
        UserError: it cannot be read, is not a mapping, or has a key twice.
    """
    loader = type("_PlainLoader", (_Loader,), {"yaml_implicit_resolvers": {}}) if plain else _Loader
    try:
        content = yaml.load(path.read_text(), loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from error
    except _TwiceError as error:
        where = f"{path}, line {error.problem_mark.line + 1}"
        raise UserError(f"{where}: {error.problem}; keep one of the two") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content or {}, dict):
        raise UserError(f"{path}: must be a mapping of settings")
    return content or {}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by name. Raises UserError when there is none."""
    for path in (Path(name).expanduser(), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    have = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    near = difflib.get_close_matches(name, have, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--config {name}: no such recipe; {hint}give a YAML file or one of {', '.join(have)}")


def read_recipe(path: Path, stage: str, task: str | None = None) -> dict[str, Any]:
    """A recipe's settings for `stage`, and for its task where it has several, by `task` or by the recipe's own.

    Raises:
        UserError: the file is not a mapping in YAML, or names no such settings.
    """
    recipe = upgrade(read_yaml(path))
    if "stage" in recipe:  # a stage's config.yaml
        recipe = {key: value for key, value in recipe.items() if key not in ("stage", "run", "dry_run")}
    stages = recipe.pop("stages", None) or {}
    if not isinstance(stages, dict):
        raise UserError(f"{path}: stages must be a mapping, a section per stage")
    stages = {str(key): value or {} for key, value in stages.items()}
    may_hold = [*STAGES, *TASKS[1:]]
    unknown = sorted(set(stages) - set(may_hold))
    if unknown:
        raise UserError(f"{path}: stages has no {', '.join(unknown)}; it may hold {', '.join(may_hold)}")
    for part, prefix in ((recipe, ""), *((part, f"stages.{key}.") for key, part in stages.items())):
        _check_names(path, part, prefix)
    merged = merge(recipe, stages.get(stage, {}))
    return merge(merged, stages.get(task or merged.get("task"), {})) if isinstance(STAGES.get(stage), dict) else merged


def _check_names(path: Path, part: Any, prefix: str, kind: type = Settings, inside: str = "") -> None:
    if not isinstance(part, Mapping):
        raise UserError(f"{path}: {prefix.rstrip('.')} {part!r}: must be a mapping of settings")
    kinds = {f.name: f.type for f in dataclasses.fields(kind)}
    for key, value in part.items():
        if key not in kinds:
            raise UserError(f"{path}: {prefix}{key}: {no_such(f'{inside}{key}')}")
        if dataclasses.is_dataclass(kinds[key]):
            _check_names(path, value, f"{prefix}{key}.", kinds[key], f"{inside}{key}.")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Settings laid over others. A teacher is one unit: another name drops what belongs to the old one."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        if both and key == "teacher" and value.get("name", below.get("name")) != below.get("name"):
            below = {}
        merged[key] = merge(below, value) if both else value
    return merged


def run_recipe(settings: Settings) -> str:
    """The YAML of what a run was begun with, for its later stages: the recipe, and what was typed beyond it.

    Typed settings of the teacher, the student, the data and the machine are the run's. Those of the training loop and
    of a stage are that stage's own.
    """
    source = Path(settings.source)
    recipe = read_recipe(source, settings.stage, settings.task)
    now, defaults = as_dict(settings), as_dict(Settings(stage=settings.stage))
    typed: dict[str, Any] = {}
    for group in ("teacher", "student", "data", "wandb"):
        given = merge(defaults[group], recipe.get(group) or {})
        of_run = {key: value for key, value in now[group].items() if key not in ("parent", "trainable")}
        typed[group] = {key: value for key, value in of_run.items() if value != given[key]}
    for name in ("deepspeed", "tracking"):
        if now[name] != recipe.get(name, defaults[name]):
            typed[name] = now[name]
    typed = {key: value for key, value in typed.items() if value}
    whole = merge(read_yaml(source), typed)
    for key, value in typed.items():
        if isinstance(value, dict):
            whole[key] = whole[key] | value  # keywords of something are one value
    head = f"# What this run was begun with, from {source.name}. Its later stages start from it.\n"
    return head + yaml.safe_dump(whole, sort_keys=False)


def _same(value: Any) -> Any:
    return value


# Settings of earlier versions, their names now, and what makes a value of now: recipes and run folders keep loading.
RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "student.feature_map": ("student.operator", _same),
    "wandb.enabled": ("tracking", lambda value: (["wandb"] if value else []) if isinstance(value, bool) else value),
}


def upgrade(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version, under the names of this one."""
    upgraded = {}
    for key, value in kept.items():
        upgraded[key] = dict(value) if isinstance(value, Mapping) else value
    for old, (new, convert) in RENAMED.items():
        (old_group, old_name), (new_group, _, new_name) = old.split("."), new.rpartition(".")
        if isinstance(upgraded.get(old_group), dict) and old_name in upgraded[old_group]:
            into = upgraded.setdefault(new_group, {}) if new_group else upgraded
            into[new_name] = convert(upgraded[old_group].pop(old_name))
    stages = upgraded.get("stages")
    if isinstance(stages, dict):
        upgraded["stages"] = {k: upgrade(part) if isinstance(part, Mapping) else part for k, part in stages.items()}
    return upgraded


def _build(kind: type, given: Namespace) -> Any:
    values = {}
    for f in dataclasses.fields(kind):
        value = given[f.name]
        values[f.name] = _build(f.type, value) if dataclasses.is_dataclass(f.type) else value
    return kind(**values)


def _resolve(settings: Settings) -> None:
    """Each group's own word on how it fits the others: the common ones', and those of the stage that runs."""
    of_stage = set(_room(place_of(settings)))
    for f in dataclasses.fields(settings):
        group = getattr(settings, f.name)
        if hasattr(group, "resolve") and (f.name in of_stage or f.name not in OF_STAGES):
            with user_errors():
                group.resolve(settings)


def as_dict(settings: Common) -> dict[str, Any]:
    """The settings as a nested dict of plain values."""
    return dataclasses.asdict(settings)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}. Keywords of something are one value."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and not key.endswith("kwargs"):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def free_settings() -> set[str]:
    """The settings, or whole groups, that may change between a run and its continuation."""
    groups = ((f.name, f.type) for f in dataclasses.fields(Settings) if dataclasses.is_dataclass(f.type))
    return FREE | {f"{name}.{part}" for name, kind in groups for part in getattr(kind, "free", ())}


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Name and values of the first setting that differs and may not change, or None; see `differences`."""
    return next(iter(differences(before, now)), None)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """Name and values of the settings that differ and may not change between a run and its continuation.

    Args:
        before: settings as a run folder keeps them, maybe of an earlier version.
    """
    before, now, free = flatten(upgrade(before)), flatten(now), free_settings()
    before = flatten(as_dict(Settings(stage="1"))) | before  # a setting that is younger than the run

    def may_change(key: str) -> bool:
        return any(key == name or key.startswith(f"{name}.") for name in free)

    changed = [key for key in sorted(before.keys() & now.keys()) if not may_change(key) and before[key] != now[key]]
    return tuple(f"{key} was {before[key]!r}, is now {now[key]!r}" for key in changed)
