"""Damaged and hostile files, and settings that nobody would type: the families of `faults` that give them."""

import json
import os
import pickle
import shutil
import string
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data.beton import side_file
from models import read_config, save
from tests.conftest import ROOT
from tests.suites.faults import (
    EQUAL,
    ERROR,
    LOST,
    SETUPS,
    UNEXPLAINED,
    Bench,
    Fault,
    Reference,
    Run,
    differences,
    ending,
    error_line,
    judge,
    published,
)  # fmt: skip
from tests.support.damage import KINDS, damage
from trainer.config import Settings, UserError, names, parse
from trainer.output.folder import StageFolder

# --- A short stage 2, whose every file can be exchanged --------------------------------------------------------------


def short(bench: Bench, run: Path, **other: Any) -> list[str]:
    """Arguments of a run that reads each image once. `other`: options by name, with _ for the dot."""
    options = {
        "config": bench.small / "recipe.yaml",
        "stage": 2,
        "run": run,
        "student.parent": parent(bench),
        "deepspeed": ROOT / "ds_configs/zero1.json",
        "train.save_every": 3,
    } | {name.replace("_", "."): value for name, value in other.items()}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def parent(bench: Bench) -> Path:
    """An export of stage 1."""
    argv = ["--config", str(bench.small / "recipe.yaml"), "--stage", "1", "--run"]
    return bench.reference("parent", lambda run: [*argv, str(run)], 1).folder / "export"


def undamaged(bench: Bench) -> Reference:
    """The short run with nothing damaged."""
    return bench.reference("short", lambda run: short(bench, run), 2)


def refusal(run: Run, *names: str) -> tuple[str, str]:
    """(outcome, what to say) of a run that should have ended in a clear error that says one of `names`."""
    line = error_line(run)
    if line is None:
        return UNEXPLAINED, ending(run)
    return (ERROR, line) if any(name in line for name in names) else (UNEXPLAINED, f"names none of {names}: {line}")


def judged(bench: Bench, place: Path, run: Run, *names: str) -> tuple[str, str]:
    """(outcome, what to say) of a short run: as the undamaged one, or refused with one of `names`."""
    outcome, said = judge(run, place / "run/stage2", undamaged(bench).folder, whole=False)
    return refusal(run, *names) if outcome == ERROR else (outcome, said)


def fault(kind: str, place: Path, outcome: str, what: str, said: str) -> list[Fault]:
    """The outcome; the folder of one that went as it should is removed."""
    if outcome in (EQUAL, ERROR):
        shutil.rmtree(place)
    return [Fault(kind, outcome, f"{what}: {said}")]


# --- Images, weights, exports ----------------------------------------------------------------------------------------


def beton(bench: Bench, number: int) -> list[Fault]:
    """A damaged .beton file, or the JSON beside it."""
    rng, place = bench.rng("beton", number), bench.place("beton", number)
    split = ("train", "train", "val")[number % 3]
    path = place / f"{split}.beton"
    shutil.copy(bench.small / path.name, path)
    shutil.copy(side_file(bench.small / path.name), side_file(path))
    if number % 6 == 5:
        kind, what = ".beton: JSON beside", _damage_text(side_file(path), rng)
    else:
        way = KINDS[number % len(KINDS)]
        kind, what = f".beton: {way}", damage(path, way, rng)
    run = bench.finish(short(bench, place / "run", **{f"data_{split}": path}))
    return fault(kind, place, *_swap(what, judged(bench, place, run, path.name)))


def weights(bench: Bench, number: int) -> list[Fault]:
    """A damaged teacher, whose parent export knows what it was."""
    rng, place = bench.rng("weights", number), bench.place("weights", number)
    path = place / ("teacher.safetensors", "teacher.pth")[number % 2]
    if path.suffix == ".pth":
        torch.save(load_file(bench.small / "teacher.safetensors"), path)
    else:
        shutil.copy(bench.small / path.name, path)
    what = damage(path, KINDS[number // 2 % len(KINDS)], rng)
    run = bench.finish(short(bench, place / "run", teacher_weights=path))
    return fault("teacher file", place, *_swap(what, judged(bench, place, run, path.name, "teacher.sha256")))


def export(bench: Bench, number: int) -> list[Fault]:
    """A damaged parent."""
    rng, place = bench.rng("export", number), bench.place("export", number)
    shutil.copytree(parent(bench), place / "parent")
    path = place / "parent" / ("model.safetensors", "config.json")[number % 2]
    what = _damage_text(path, rng) if path.suffix == ".json" else damage(path, str(rng.choice(KINDS)), rng)
    run = bench.finish(short(bench, place / "run", student_parent=path.parent))
    return fault(f"parent export: {path.name}", place, *_swap(what, judged(bench, place, run, str(path.parent))))


def _swap(what: str, found: tuple[str, str]) -> tuple[str, str, str]:
    return found[0], what, found[1]


# --- Texts: recipe, DeepSpeed's JSON, what lies in the run folder ----------------------------------------------------


def _damage_text(path: Path, rng: np.random.Generator) -> str:
    """Damage that hits a short file: a character or a line changed, lost or doubled, or all of it."""
    data = bytearray(path.read_bytes())
    at = int(rng.integers(len(data)))
    end = min(len(data), at + int(rng.integers(1, 40)))
    way = str(rng.choice(["flip", "cut", "lose", "double", "garble", "empty", "deep", "zeros"]))
    if way == "flip":
        data[at] ^= 1 << int(rng.integers(8))
    elif way == "cut":
        del data[at:]
    elif way == "lose":
        del data[at:end]
    elif way == "double":
        data[at:at] = data[at:end]
    elif way == "garble":
        data[at:end] = rng.bytes(end - at)
    elif way == "empty":
        data.clear()
    elif way == "deep":
        data[:] = b"[" * 100_000
    elif way == "zeros":
        data[at:end] = bytes(end - at)
    path.write_bytes(data)
    return f"{path.name}: {way} at {at}"


def _read(path: Path) -> Any:
    """What a text says, or None where it says nothing that can be read."""
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def text(bench: Bench, number: int) -> list[Fault]:
    """A damaged recipe or DeepSpeed configuration. One that still is valid, and says something else, is no fault."""
    rng, place = bench.rng("text", number), bench.place("text", number)
    source = (bench.small / "recipe.yaml", ROOT / "ds_configs/zero3.json")[number % 2]
    path = place / source.name
    shutil.copy(source, path)
    what = _damage_text(path, rng)
    name = {"recipe.yaml": "config", "zero3.json": "deepspeed"}[path.name]
    given = {"deepspeed": ROOT / "ds_configs/zero3.json", name: path}
    run = bench.finish([*short(bench, place / "run", **given), "--dry_run"])
    if run.code == 0 and _read(path) != _read(source):
        shutil.rmtree(place)
        return []
    if run.code == 0:
        whole = bench.finish([*short(bench, place / "run", deepspeed=ROOT / "ds_configs/zero3.json"), "--dry_run"])
        outcome, said = (EQUAL, "") if whole.text("out") == run.text("out") else (LOST, run.text("out"))
    else:
        # A value that fits its type and nothing else is named by its setting.
        outcome, said = refusal(run, "")
    if (place / "run").exists():
        outcome, said = UNEXPLAINED, f"a run folder was made; {said}"
    return fault(f"text: {path.name}", place, outcome, what, said)


def kept(bench: Bench, number: int) -> list[Fault]:
    """A damaged config.yaml or metrics.jsonl in the folder of a run that goes on."""
    rng, place, setup = bench.rng("kept", number), bench.place("kept", number), SETUPS[0]
    reference = bench.undisturbed(setup).folder
    folder = place / reference.name
    shutil.copytree(reference, folder)
    shutil.rmtree(folder / "export")
    shutil.rmtree(folder / f"checkpoints/step-{published(folder)[-1]:08d}")
    path = folder / ("config.yaml", "metrics.jsonl")[number % 2]
    what, before = _damage_text(path, rng), path.read_bytes()
    run = bench.finish(setup.argv(bench.small, place))
    if run.code == 2:
        outcome, said = refusal(run, str(folder))
        if path.read_bytes() != before:
            outcome, said = LOST, f"{path.name} was changed; {said}"
    elif run.code == 0:
        wrong = differences(folder, reference)
        if path.name == "metrics.jsonl":  # what was damaged cannot come back; what is there can be read
            wrong = [line for line in wrong if "metrics" not in line]
            lines = path.read_text().splitlines()
            wrong += [f"cannot be read: {line}" for line in lines if not isinstance(_read_line(line), dict)]
        outcome, said = (LOST, "; ".join(wrong)) if wrong else (EQUAL, "")
    else:
        outcome, said = UNEXPLAINED, ending(run)
    return fault(f"run folder: {path.name}", place, outcome, what, said)


def exchanged(bench: Bench, number: int) -> list[Fault]:
    """Another teacher, or other images, under the old name when a run goes on."""
    place = bench.place("exchanged", number)
    teacher, images, beside = names = ("teacher.safetensors", "train.beton", "train.beton.json")
    for name in names:
        shutil.copy(bench.small / name, place)
    given = {"teacher_weights": place / teacher, "data_train": place / images, "student_parent": "none"}
    argv = short(bench, place / "run", **given)
    first = bench.finish(argv)
    if first.code != 0:
        return fault("exchanged file", place, UNEXPLAINED, "before any fault", ending(first))
    folder = place / "run/stage2"
    shutil.rmtree(folder / "export")
    shutil.rmtree(folder / "checkpoints/step-00000006")
    if number % 2:
        state = load_file(place / teacher)
        state[str(bench.rng("exchanged", number).choice(sorted(state)))].view(-1)[0] += 1
        save_file(state, place / teacher)
    else:
        shutil.copy(bench.small / "val.beton", place / images)
        shutil.copy(bench.small / "val.beton.json", place / beside)
    name, before = (teacher if number % 2 else images), _contents(folder)
    outcome, said = refusal(bench.finish(argv), name)
    if _contents(folder) != before:
        outcome, said = LOST, f"the run folder was changed; {said}"
    return fault(f"exchanged file: {name}", place, outcome, "another under its name", said)


def lineage(bench: Bench, number: int) -> list[Fault]:
    """What the stage before is: exchanged under a half-trained stage, gone, appeared, or not finished."""
    place, kind = bench.place("lineage", number), ("exchanged", "gone", "appeared", "unfinished")[number % 4]
    run, earlier = place / "run", place / "run/stage1"
    argv = short(bench, run)
    argv[argv.index("--student.parent") : argv.index("--student.parent") + 2] = []
    if kind != "appeared":
        shutil.copytree(parent(bench).parent, earlier)
    if kind == "unfinished":
        shutil.rmtree(earlier / "export")
        outcome, said = refusal(bench.finish(argv), "stage 1 is not finished")
        if (run / "stage2").exists():
            outcome, said = LOST, f"a stage was begun; {said}"
        return fault("parent: unfinished", place, outcome, kind, said)
    first = bench.finish(argv)
    if first.code != 0:
        return fault(f"parent: {kind}", place, UNEXPLAINED, "before any fault", ending(first))
    folder = run / "stage2"
    shutil.rmtree(folder / "export")
    shutil.rmtree(folder / "checkpoints/step-00000006")
    if kind == "exchanged":
        config, state = read_config(earlier / "export"), load_file(earlier / "export/model.safetensors")
        state["head.bias"].add_(1)
        save(earlier / "export", state, config)
    elif kind == "gone":
        shutil.rmtree(earlier)
    else:
        shutil.copytree(parent(bench).parent, earlier)
    before = _contents(folder)
    outcome, said = refusal(bench.finish(argv), "student.parent")
    if _contents(folder) != before:
        outcome, said = LOST, f"the run folder was changed; {said}"
    return fault(f"parent: {kind}", place, outcome, "under a half-trained stage", said)


def unshared(bench: Bench, number: int) -> list[Fault]:
    """Two ranks whose run folders are not the same folder, as on two nodes that do not share a file system."""
    place = bench.place("unshared", number)
    run = bench.start(short(bench, place / "run"), ranks=2, of_rank={1: ["--run", str(place / "node1")]})
    run.wait(300)
    outcome, said = refusal(run, "is another folder on rank 0")
    if list(place.rglob("step-*")):
        outcome, said = LOST, f"a checkpoint was published; {said}"
    return fault("unshared run folder", place, outcome, "two ranks", said)


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _read_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def _lose(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.unlink()


def _exchange(path: Path, other: Path, rng: np.random.Generator) -> None:
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def _empty(path: Path, other: Path, rng: np.random.Generator) -> None:
    for file in path.parent.iterdir():
        file.unlink()


def _lie(path: Path, other: Path, rng: np.random.Generator) -> None:
    manifest = path.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    content[str(rng.choice(["step", "samples", "world_size"]))] = int(rng.integers(100))
    manifest.write_text(json.dumps(content, indent=2))


def _mispoint(path: Path, other: Path, rng: np.random.Generator) -> None:
    for name in ("latest", "best"):
        words = ["step-00000099", "../../..", "", "\0", "step-00000004"]
        (path.parent.parent / name).write_text(str(rng.choice(words)))


def _stray(path: Path, other: Path, rng: np.random.Generator) -> None:
    folder = path.parent.parent
    for name in ("step-x", "step-00000099", ".writing-step-00000044", "step-00000098.part"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "rank-00000.safetensors").write_bytes(rng.bytes(100))


def _shorten(path: Path, other: Path, rng: np.random.Generator) -> None:
    os.truncate(path, path.stat().st_size // 2)


HARM: dict[str, Callable[[Path, Path, np.random.Generator], None]] = {
    "truncated": _shorten, "missing": _lose, "swapped between ranks": _exchange, "swapped between steps": _exchange,
    "emptied": _empty, "lying manifest": _lie, "wrong latest": _mispoint, "strays": _stray,
}  # fmt: skip


def checkpoint(bench: Bench, number: int) -> list[Fault]:
    """Damage to the newest checkpoints of a run that goes on."""
    rng, place = bench.rng("checkpoint", number), bench.place("checkpoint", number)
    ways = (*KINDS, *HARM)
    way = ways[number % len(ways)]
    setup = [s for s in SETUPS if s.ranks == 2 or way != "swapped between ranks"][number // len(ways) % 4]
    reference = bench.undisturbed(setup).folder
    folder = place / reference.name
    shutil.copytree(reference, folder)
    shutil.rmtree(folder / "export")
    if rng.random() < 0.5:
        shutil.rmtree(folder / f"checkpoints/step-{published(folder)[-1]:08d}")
    steps = published(folder)
    hit = steps[-int(rng.integers(1, len(steps) + 1)) :]
    if way.startswith("swapped"):
        hit = hit[-1:]
    said = []
    for step in hit:
        files = sorted((folder / f"checkpoints/step-{step:08d}").iterdir())
        shards = [file for file in files if file.suffix != ".json"]
        if way in HARM:
            other = shards[-1] if way == "swapped between ranks" else _of_step(shards[0], steps[0])
            HARM[way](shards[0], other, rng)
            said.append(f"step {step}: {way}")
        else:
            said.append(f"step {step}: {damage(files[int(rng.integers(len(files)))], way, rng)}")
    left = [step for step in published(reference) if step in steps and _same(folder, reference, step)]
    run = bench.finish(setup.argv(bench.small, place), setup.ranks)
    outcome, words = judge(run, folder, reference)
    start = f"from step {left[-1]}," if left else ", to step "
    if outcome == EQUAL and start not in run.text("err"):
        outcome, words = LOST, f"did not go on from {left[-1:]}: {run.text('err')[-800:]}"
    if outcome == EQUAL and steps[-1] not in left and f"step-{steps[-1]:08d}" not in run.text("err"):
        outcome, words = UNEXPLAINED, f"passed over without a word: {run.text('err')[-800:]}"
    if outcome == ERROR:  # the others are good
        outcome = LOST
    return fault(f"checkpoint: {way}", place, outcome, f"{setup}: {', '.join(said)}", words)


def _of_step(path: Path, step: int) -> Path:
    return path.parent.parent / f"step-{step:08d}" / path.name


def _same(folder: Path, reference: Path, step: int) -> bool:
    """Whether a checkpoint is as it was."""
    mine, theirs = (path / f"checkpoints/step-{step:08d}" for path in (folder, reference))
    names = {file.name for file in theirs.iterdir()}
    return names == {file.name for file in mine.iterdir()} and all(
        (mine / name).read_bytes() == (theirs / name).read_bytes() for name in names
    )


# --- Hostile files ---------------------------------------------------------------------------------------------------


class Command:
    """Pickled, it runs a command when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


class Code(Command):
    """The same without a shell."""

    def __reduce__(self) -> tuple:
        return exec, (f"open({str(self.canary)!r}, 'w')",)


def _plain(path: Path, what: Any) -> None:
    path.write_bytes(pickle.dumps(what, protocol=path.name.__hash__() % 6))


def _torch_zip(path: Path, what: Any) -> None:
    torch.save({"state_dict": what, "cls_token": torch.zeros(1)}, path)


def _torch_legacy(path: Path, what: Any) -> None:
    torch.save({"cls_token": what}, path, _use_new_zipfile_serialization=False)


def _numpy(path: Path, what: Any) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([what], dtype=object), allow_pickle=True)


def _zip(path: Path, what: Any) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(what, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("../../escaped", "outside")


def _yaml(path: Path, what: Command) -> None:
    path.write_text(f"!!python/object/apply:os.system ['touch {what.canary}']\n")


PICKLES = (_plain, _torch_zip, _torch_legacy, _numpy, _zip, _yaml)
# The option that takes the file, and its name.
DOORS = (
    ("teacher.weights", "teacher.pth"), ("teacher.weights", "teacher.safetensors"), ("teacher.weights", "teacher.bin"),
    ("teacher.weights", "teacher.pt"), ("data.train", "train.beton"), ("data.val", "val.beton.json"),
    ("config", "recipe.yaml"), ("deepspeed", "zero1.json"), ("student.parent", "parent/config.json"),
    ("student.parent", "parent/model.safetensors"), ("run", "checkpoint"), ("teacher.weights", "teacher.npz"),
)  # fmt: skip


def hostile(bench: Bench, number: int) -> list[Fault]:
    """A file that runs a command when it is unpickled, or read as YAML with tags, wherever a file is taken."""
    place, canary = bench.place("hostile", number), bench.folder / f"canary-{number}"
    door, name = DOORS[number % len(DOORS)]
    write, command = PICKLES[number // len(DOORS) % len(PICKLES)], (Command, Code)[number % 2](canary)
    path, given = place / name, {}
    kind, reference = f"hostile file as {door}", undamaged(bench).folder
    if door == "run":  # the file of a rank in its newest checkpoint
        folder = place / "run/stage2"
        shutil.copytree(reference, folder)
        shutil.rmtree(folder / "export")
        path = next(file for file in (folder / "checkpoints/step-00000006").iterdir() if file.suffix != ".json")
    elif door == "student.parent":
        shutil.copytree(parent(bench), place / "parent")
        given = {door: path.parent}
    elif name == "val.beton.json":
        shutil.copy(bench.small / "val.beton", place)
        given = {door: place / "val.beton"}
    else:
        given = {door: path}
    write(path, command)
    run = bench.finish(short(bench, place / "run", **given))
    if canary.exists():
        outcome, said = LOST, f"the command was run; {ending(run)}"
    elif door == "run":
        outcome, said = judge(run, folder, reference)
    else:
        outcome, said = refusal(run, path.name, place.name, "--config")
    return fault(kind, place, outcome, f"{write.__name__} in {name}", said)


# --- Settings --------------------------------------------------------------------------------------------------------

# What YAML, JSON, or a shell takes for something else than it looks.
_ODD = (
    10**400, -(10**30), "1e400", "0x10", "1_000", "null", "~", "yes", "\u0661", "${x}", "1:30", "-", "{}", "[", "&a",
    "*a", "!!int 3", "\0", "\ud800", "../..", "nan", "inf", "None", "True",
)  # fmt: skip
_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 100), st.floats(), st.text(max_size=20),
    st.sampled_from(_ODD),
)  # fmt: skip
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
_SETTINGS = dict(names(Settings))
# A value of the kind that the setting wants, near the borders of what it may be.
_FITTING = st.one_of(st.integers(-1, 3), st.floats(-0.5, 2), st.booleans(), st.lists(st.floats(0, 1), max_size=3))
_NAMES = st.one_of(
    st.sampled_from(sorted(_SETTINGS)),
    st.sampled_from(sorted(name for name, kind in _SETTINGS.items() if hasattr(kind, "__metadata__"))),
    st.text(string.ascii_lowercase + "._", max_size=12),
)


@st.composite
def _recipes(draw: st.DrawFn) -> tuple[Any, list[str]]:
    """(what a recipe holds, options on the command line)."""
    recipe: Any = {}
    for name in draw(st.lists(_NAMES, max_size=4)):
        at, (*sections, last) = recipe, name.split(".")
        for section in sections:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                break
        else:
            at[last] = draw(_FITTING | _VALUES)
    if draw(st.integers(0, 9)) == 0:
        recipe = draw(_VALUES)
    elif draw(st.integers(0, 4)) == 0:
        recipe["stages"] = draw(st.dictionaries(st.sampled_from(["1", "2", 2, "9"]), _VALUES, max_size=2) | _VALUES)
    options = []
    for name in draw(st.lists(_NAMES, max_size=3)):
        value = draw(_FITTING | _VALUES)
        said = value if isinstance(value, str) else json.dumps(value)
        options += draw(st.sampled_from([[f"--{name}", said], [f"--{name}={said}"], [f"--{name}"], [said]]))
    return recipe, [word.replace("\0", "") for word in options]


def settings(bench: Bench, number: int) -> list[Fault]:
    """Drawn settings: parsed here, and the last of each lot given to the program with --dry_run."""
    place, found, last = bench.place("settings", number), [], []
    path = place / "recipe.yaml"

    @hypothesis.seed(int(bench.rng("settings", number).integers(2**32)))
    @hypothesis.settings(
        max_examples=10, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(_recipes())
    def tried(drawn: tuple[Any, list[str]]) -> None:
        recipe, options = drawn
        content = yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "surrogatepass")
        argv = ["--config", str(path), "--stage", "2", "--run", str(place / "run"), *options]
        path.write_bytes(content)
        outcome, said = EQUAL, ""
        try:
            with PARSING:
                parsed = parse([word.encode("utf-8", "replace").decode() for word in argv])
            # What is accepted is what a run folder keeps: read back, it is the same.
            StageFolder(parsed).check(parsed)
        except (UserError, ValueError, OSError) as error:
            outcome, said = ERROR, str(error)
        except SystemExit as error:  # --help and --print_config
            said = f"ended with {error.code}"
            outcome = EQUAL if not error.code and {"-h", "--help", "--print_config"} & set(options) else UNEXPLAINED
        except Exception as error:
            outcome, said = UNEXPLAINED, f"{type(error).__name__}: {error}; {recipe!r} {options!r}"[:1500]
        found.append(Fault("settings: parsed", outcome, said[:200] if outcome == ERROR else said))
        last[:] = [argv, content]

    tried()
    argv, content = last
    path.write_bytes(content)
    argv = [word.encode("utf-8", "replace").decode() for word in argv]
    run = bench.finish([*argv, "--dry_run"])
    outcome, said = (EQUAL, "") if run.code == 0 else refusal(run, "")
    if (place / "run").exists():
        outcome, said = UNEXPLAINED, f"a run folder was made; {said}"
    found.append(Fault("settings: --dry_run", outcome, said if outcome == ERROR else f"{argv}: {content!r}: {said}"))
    return found


# Two threads in the ast of Python 3.11 at a time may be a SystemError; the program has one.
PARSING = threading.Lock()
FAMILIES: dict[str, Callable[[Bench, int], list[Fault]]] = {
    "beton": beton, "weights": weights, "export": export, "text": text, "kept": kept, "checkpoint": checkpoint,
    "hostile": hostile, "exchanged": exchanged, "lineage": lineage,
}  # fmt: skip
