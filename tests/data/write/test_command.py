"""The command line: what it says, one line per mistake, and nothing lost or left behind when it fails."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import inspect
from data.write import main
from tests.support.pictures import content, picture

ROOT = Path(__file__).parents[3]


def error_line(capsys) -> str:
    """The one line of an error; the progress and the names of unreadable files go before it."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def test_a_class_a_subfolder(folder, tmp_path):
    out = tmp_path / "new" / "x.beton"
    run = subprocess.run(
        [sys.executable, "-m", "data.write", folder, out, "--raw_share", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0 and "Warning" not in run.stderr
    assert "6 images, labelled: 2 classes" in run.stdout
    side = json.loads((out.parent / "x.beton.json").read_text())
    assert side["classes"] == ["ant", "cat"] and side["count"] == 6 and side["skipped"] == []
    assert side["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest() and side["bytes"] == out.stat().st_size
    assert side["source"] == str(folder) and side["settings"]["raw_share"] == 1
    assert sorted(os.listdir(out.parent)) == ["x.beton", "x.beton.json"]
    assert inspect(out).classes == ["ant", "cat"]
    images, labels = content(out)
    assert labels == [0, 0, 0, 1, 1, 1]
    assert all(np.array_equal(images[i], picture(10 + i)) for i in range(3))
    assert all(np.array_equal(images[3 + i], picture(i)) for i in range(3))


def test_user_mistakes_are_one_line_and_status_2(folder, tmp_path, capsys):
    out = tmp_path / "x.beton"
    (folder / "empty").mkdir()
    (tmp_path / "none").mkdir()
    cases = [
        ([folder, out], "class folders without images: empty; remove them, or pass --unlabelled"),
        ([tmp_path / "missing", out], "missing: no such folder"),
        ([tmp_path / "none", out], "holds no images"),
        ([folder, tmp_path, "--unlabelled"], "is a folder; name a file"),
        ([folder, out, "--unlabelled", "--quality", 0], "quality 0: must be in 1..100"),
        ([folder, out, "--unlabelled", "--raw_share", "1.5"], "raw_share 1.5"),
        ([folder, out, "--unlabelled", "--raw_share", "some"], "raw_share"),
        ([folder, out, "--unlabelled", "--max_side", 70000], "max_side 70000"),
        ([folder, out, "--colour"], "unrecognized arguments: --colour"),
        ([folder], "required: out"),
    ]
    for arguments, message in cases:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        assert status == 2 and message in error_line(capsys)
    assert not list(tmp_path.glob("*x.beton*"))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_unreadable_files(folder, tmp_path, capsys):
    out = tmp_path / "x.beton"
    out.write_bytes(b"older")
    (folder / "ant" / "1.png").write_bytes((folder / "ant" / "1.png").read_bytes()[:40])
    (folder / "cat" / "9.jpg").write_text("no image")
    assert main([str(folder), str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("unreadable: ") for line in lines) == 2
    assert lines[-1].startswith("error: 2 of 7 images unreadable, the first is") and "ant/1.png" in lines[-1]
    assert out.read_bytes() == b"older" and os.listdir(tmp_path) == ["images", "x.beton"]

    assert main([str(folder), str(out), "--skip_unreadable", "--raw_share", "1"]) == 0
    skipped = json.loads((tmp_path / "x.beton.json").read_text())["skipped"]
    assert [Path(entry["name"]).name for entry in skipped] == ["1.png", "9.jpg"] and skipped[0]["reason"]
    images, labels = content(out)
    assert labels == [0, 0, 1, 1, 1]
    for image, index in zip(images, [10, 12, 0, 1, 2], strict=True):
        assert np.array_equal(image, picture(index))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs a user namespace to mount a small file system")
def test_no_space_left(tmp_path):
    for index in range(40):
        noise = np.random.default_rng(index).integers(0, 256, (500, 500, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png", compress_level=0)
    script = """
        mount -t tmpfs -o size=20m tmpfs "$1" && echo older > "$1/x.beton"
        "$2" -m data.write "$3" "$1/x.beton" --raw_share 1; echo "status $?"; ls -A "$1"; cat "$1/x.beton"
    """
    (tmp_path / "small").mkdir()
    command = ["unshare", "-rm", "sh", "-c", script, "sh", tmp_path / "small", sys.executable, tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.stdout.splitlines()[-3:] == ["status 2", "x.beton", "older"]
    error = run.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and "no space left for x.beton; make room" in error
