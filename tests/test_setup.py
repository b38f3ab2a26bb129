"""Set-up and packaging: the lock, the wheel, and tools/setup.sh (with a stand-in for Python: nothing is installed)."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image

import models
from trainer.ranks.world import DRIVERS

ROOT = Path(__file__).resolve().parents[1]


# --- The lock -------------------------------------------------------------------------------------------------------


def locked() -> dict[str, str]:
    """Requirements of the lock: name to the lines that follow it."""
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return {re.match(r"[\w.-]+", entry)[0].lower(): entry for entry in entries if entry.strip()}


def test_lock_holds_names_versions_and_hashes_only():
    for name, entry in locked().items():
        first, *rest = entry.replace("\\\n", "\n").strip().splitlines()
        assert re.match(r"[\w.-]+==[\w.+!-]+( ; .+)?$", first.strip()), f"not a pinned version: {first}"
        assert "+" not in first.split(";")[0], f"a local build: {first}"
        assert rest, f"{name} has no hash"
        for line in rest:
            assert re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line.strip()), f"{name}: {line}"


def test_lock_covers_pyproject():
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [*whole["project"]["optional-dependencies"].values(), *whole["dependency-groups"].values()]
    wanted = [*whole["project"]["dependencies"], *(requirement for part in parts for requirement in part)]
    missing = {re.match(r"[\w.-]+", r)[0].lower() for r in wanted} - set(locked())
    assert not missing, f"run `make lock`: {sorted(missing)}"


# --- The wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that nothing is left in the clone."""
    copy = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in ("models", "data", "trainer"):  # the last two must stay out
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "dist", "."]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_carries_models_alone(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"unsoftmax"}
    ours = {p.relative_to(ROOT / "models").as_posix() for p in (ROOT / "models").rglob("*.py")}
    packed = {n.removeprefix("unsoftmax/") for n in names if n.endswith(".py")}
    assert packed == ours, "a folder of models/ is not in [tool.setuptools] packages of pyproject.toml"


def metadata_of(wheel):
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(path).decode())


def test_wheel_needs_torch_timm_and_einops_only(wheel):
    metadata = metadata_of(wheel)
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.match(r"[\w.-]+", r)[0] for r in required} == {"torch", "timm", "einops"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_wheel_offers_extras_of_use_to_it_and_types(wheel):
    metadata = metadata_of(wheel)
    assert set(metadata.get_all("Provides-Extra")) == {"onnx", "mask2former"}  # no trainer comes with it
    assert not re.search("deepspeed|ffcv|pytest", " ".join(metadata.get_all("Requires-Dist")))
    assert "unsoftmax/py.typed" in wheel.namelist() and "Typing :: Typed" in metadata.get_all("Classifier")


def test_one_version_is_named_everywhere(wheel):
    version = metadata_of(wheel)["Version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (newest, date), *_ = re.findall(r"^## \[(\d\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version == models.__version__ == cited["version"] == newest
    assert date == str(cited["date-released"])


def test_the_container_has_what_the_lock_needs():
    text = (ROOT / "containers/Dockerfile").read_text()
    cuda = re.search(r"^ARG CUDA=(\d+)\.", text, re.MULTILINE)[1]
    assert locked()["cuda-toolkit"].startswith(f"cuda-toolkit=={cuda}."), "torch is built for another CUDA"
    assert f"driver {DRIVERS[cuda]} or newer" in text
    for copied in re.findall(r"^COPY (\S+)", text, re.MULTILINE):
        assert (ROOT / copied).exists(), copied


def test_wheel_imports_outside_the_clone(wheel, tmp_path):
    wheel.extractall(tmp_path)
    # -S keeps the clone's own .pth away; what the wheel may use comes from site-packages by name.
    site = next(p for p in sys.path if p.endswith("site-packages"))
    code = (
        f"import sys; sys.path += [{str(tmp_path)!r}, {site!r}]; import unsoftmax; "
        "bad = sorted({'models', 'data', 'trainer', 'ffcv', 'deepspeed'} & set(sys.modules)); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


USE = """
import json, runpy, sys
import onnxruntime, timm, torch
from PIL import Image
from unsoftmax import load

vit = load("export")
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))
images = transform(Image.open("photo.jpg").convert("RGB"))[None]
with torch.no_grad():
    logits = vit(images)
assert vit.pretrained_cfg["label_names"][logits.argmax(-1).item()] in ("cat", "dog", "owl")
sys.argv = ["unsoftmax.onnx", "export", "student.onnx"]
try:
    runpy.run_module("unsoftmax.onnx", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
session = onnxruntime.InferenceSession("student.onnx")
theirs = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
assert (torch.from_numpy(theirs) - logits).abs().max() < 1e-4
bad = sorted({"models", "data", "trainer", "ffcv", "deepspeed"} & set(sys.modules))
assert not bad, bad
"""


def test_an_export_is_used_with_the_wheel_alone(wheel, tmp_path):
    wheel.extractall(tmp_path)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3}
    student = models.linearize(timm.create_model("vit_tiny_patch16_224", **kwargs), "focused")
    attention = {"operator": "focused", "kwargs": {"power": 6}, "additions": [], "linear_blocks": [0, 1]}
    given = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
    config = {"backbone": {"name": "vit_tiny_patch16_224", "kwargs": kwargs}, "attention": attention, "input": given}
    config |= {"lineage": {}, "classes": ["cat", "dog", "owl"]}
    models.save(tmp_path / "export", student.state_dict(), config)
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "photo.jpg")
    site = next(p for p in sys.path if p.endswith("site-packages"))
    code = f"import sys; sys.path += [{str(tmp_path)!r}, {site!r}]\n{USE}"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- tools/setup.sh -------------------------------------------------------------------------------------------------

PYTHON = """#!/bin/bash
# Stands in for Python: notes what it was asked to do, in a file beside the clone.
case "$*" in
    "-m venv .venv") echo venv >>"$CALLS"; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *"-m pip"*"-r requirements.lock") echo install >>"$CALLS"; exit "${PIP_STATUS:-0}" ;;
    *purelib*) echo "$PWD/.venv" ;;
    *"(3, 11)"*) [ -z "${TOO_OLD:-}" ] || exit 1 ;;
    *"%d.%d"*) echo 3.12 ;;
    --version) echo Python 3.12.0 ;;
esac
"""
TOOLS = ("awk", "bash", "cat", "cp", "cut", "dirname", "find", "flock", "grep", "id", "mkdir", "mv", "rm", "sha256sum")


@pytest.fixture
def clone(tmp_path):
    """A clone with a path of its own: no apt-get, no sudo, nothing but what the test puts there."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/setup.sh", tmp_path / "tools")
    (tmp_path / "requirements.lock").write_text("pip==1 \\\n    --hash=sha256:0\nsetuptools==1\nwheel==1\n")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    for name, text in {"python3": PYTHON, "pkg-config": "#!/bin/bash\n", "c++": "#!/bin/bash\n"}.items():
        script = tmp_path / "bin" / name
        script.write_text(text)
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def set_up(clone: Path, **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run set-up in ``clone``; returns what came of it and what it did."""
    calls = clone / "calls"
    calls.write_text("")
    env = {"PATH": str(clone / "bin"), "HOME": os.environ.get("HOME", "/"), "CALLS": str(calls), **env}
    script = str(clone / "tools/setup.sh")
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done, calls.read_text().split()


def test_setup_installs_once_then_updates_in_place(clone):
    done, calls = set_up(clone)
    assert done.returncode == 0, done.stderr
    assert calls == ["venv", "install"]
    assert (clone / ".venv/unsoftmax_clone.pth").read_text() == f"{clone}\n"
    assert set_up(clone)[1] == []
    with (clone / "requirements.lock").open("a") as lock:
        lock.write("more==1\n")
    assert set_up(clone)[1] == ["install"]
    assert set_up(clone)[1] == []


def test_interrupted_setup_heals(clone):
    done, calls = set_up(clone, PIP_STATUS="1")
    assert done.returncode == 2
    assert "error: pip could not install" in done.stderr
    assert calls == ["venv", "install"]
    (clone / ".venv/half").touch()
    assert set_up(clone)[1] == ["venv", "install"]
    assert not (clone / ".venv/half").exists()


def test_moved_clone_is_built_again(clone):
    set_up(clone)
    state = clone / ".venv/.set-up"
    state.write_text(state.read_text().replace(str(clone), "/elsewhere"))
    assert set_up(clone)[1] == ["venv", "install"]


def test_environment_of_the_user_is_left_alone(clone):
    (clone / ".venv").mkdir()
    (clone / ".venv/mine").touch()
    done, calls = set_up(clone)
    assert done.returncode == 2
    assert "was not made by make" in done.stderr
    assert calls == []
    assert (clone / ".venv/mine").exists()


def test_missing_packages_are_named_in_one_message(clone):
    (clone / "bin/pkg-config").write_text("#!/bin/bash\nexit 1\n")
    (clone / "bin/c++").unlink()
    done, calls = set_up(clone)
    assert done.returncode == 2
    assert calls == []
    assert done.stderr.count("error:") == 1
    assert "sudo apt-get install -y g++ libopencv-dev libturbojpeg0-dev\n" in done.stderr
    assert "conda install -c conda-forge" in done.stderr
    assert not (clone / ".venv").exists()


def test_missing_packages_come_through_apt_with_sudo(clone):
    scripts = {
        "id": "echo 1000",
        "sudo": 'echo sudo >>"$CALLS"; [ "$1" = -n ] && shift; "$@"',
        "true": "",
        "env": 'shift; "$@"',
        "apt-get": 'echo "apt-$2" >>"$CALLS"; if [ "$2" = install ]; then echo "$*" >"$CALLS.apt"; fi',
        "pkg-config": '[ -e "$CALLS.apt" ]',
    }
    for name, body in scripts.items():
        (clone / "bin" / name).unlink(missing_ok=True)
        (clone / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (clone / "bin" / name).chmod(0o755)
    done, calls = set_up(clone)
    assert done.returncode == 0, done.stderr
    assert calls == ["sudo", "sudo", "apt-update", "sudo", "apt-install", "venv", "install"]
    asked = (clone / "calls.apt").read_text().strip()
    assert asked == "-q install -y --no-install-recommends libopencv-dev libturbojpeg0-dev"
    assert set_up(clone)[1] == []


def test_missing_python_is_said(clone):
    done, _ = set_up(clone, TOO_OLD="1")
    assert done.returncode == 2
    assert "error: Python 3.11 to 3.14 and system packages are missing" in done.stderr
    done, _ = set_up(clone, TOO_OLD="1", PYTHON="python3")
    assert done.returncode == 2
    assert "error: PYTHON=python3 is not a Python from 3.11 to 3.14" in done.stderr
