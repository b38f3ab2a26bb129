"""Images that are given as a folder: written once into the cache, never stale, whole or not there."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

import data
from tests.conftest import Blobs, run_trainer
from trainer.config import Settings, UserError, parse
from trainer.ranks.signals import StopFlag, Stopped
from trainer.setup.cache import inspect_data, notes, sources, write_missing


def save_blobs(root: Path, count: int, seed: int = 0) -> Path:
    """`Blobs` as a folder of images, a subfolder per class."""
    blobs = Blobs(count, seed)
    for i in range(count):
        pixels, label = blobs[i]
        (root / Blobs.classes[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / Blobs.classes[label] / f"{i:03}.png")
    return root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_blobs(tmp_path / "My photos", 40)


def given(small: Path, images: Path, cache: Path, *more: str) -> Settings:
    """Settings as typed, of a recipe whose validation images are others'."""
    where = ["--data.train", str(images), "--data.cache", str(cache), "--run", str(cache.parent / "run")]
    return parse(["--config", str(small / "recipe.yaml"), "--stage", "2", *where, *more])


def files_of(settings: Settings) -> dict[str, Path]:
    return write_missing(sources(settings))


def test_a_folder_is_written_once_and_again_when_an_image_changes(small, images, tmp_path, capsys):
    settings, cache = given(small, images, tmp_path / "cache"), tmp_path / "cache"
    assert settings.data.val is None  # the recipe's belongs to other images
    expected = inspect_data(settings)
    assert not cache.exists() and (expected["train"].num_samples, expected["val"].num_samples) == (36, 4)
    assert f"36 images (labelled: 4 classes, a subfolder of {images} each; 4 of 40 are held out" in notes(settings)[0]
    files = files_of(settings)
    said = capsys.readouterr().err
    assert f"writing {files['train']}" in said and f"data.val: {files['val']}" in said and "image/s" in said
    found = inspect_data(settings)
    for split, info in found.items():
        assert info.path == files[split] and info.classes == list(Blobs.classes) and info.samples
        assert (info.num_samples, info.max_label) == (expected[split].num_samples, expected[split].max_label)
    assert files["train"].parent.name.startswith("My-photos-") and not notes(settings)

    written = files["train"].stat().st_mtime_ns
    assert files_of(settings) == files and files["train"].stat().st_mtime_ns == written
    assert "writing" not in capsys.readouterr().err
    shared = files_of(given(small, images, cache, "--data.val_share", "0"))
    assert "val" not in shared and data.inspect(shared["train"]).num_samples == 40

    changed = images / "a" / "000.png"
    Image.open(images / "b" / "001.png").save(changed)
    again = files_of(settings)
    assert again["train"].parent != files["train"].parent
    assert data.inspect(again["train"]).samples != found["train"].samples

    # Damaged, or lost: written again, of the same samples.
    before = data.inspect(again["train"]).samples
    with again["train"].open("r+b") as file:
        file.truncate(1000)
    assert files_of(settings) == again and data.inspect(again["train"]).samples == before
    again["val"].unlink()
    assert files_of(settings) == again and data.inspect(again["val"]).num_samples == 4
    assert not [path.name for path in cache.iterdir() if path.name.startswith(".My")]


def test_folders_with_a_val_split_and_a_val_folder(small, tmp_path):
    save_blobs(tmp_path / "set" / "train", 24)
    save_blobs(tmp_path / "set" / "val", 8, 1)
    save_blobs(tmp_path / "other", 12, 2)
    both = files_of(given(small, tmp_path / "set", tmp_path / "cache"))
    assert [data.inspect(both[split]).num_samples for split in ("train", "val")] == [24, 8]
    apart = given(small, tmp_path / "set", tmp_path / "cache", "--data.val", str(tmp_path / "other"))
    files = files_of(apart)
    assert [data.inspect(files[split]).num_samples for split in ("train", "val")] == [24, 12]
    assert files["train"].parent != files["val"].parent
    beton = given(small, small / "train.beton", tmp_path / "cache", "--data.val", str(tmp_path / "set"))
    assert files_of(beton).keys() == {"val"} and inspect_data(beton)["val"].num_samples == 8


def test_two_at_once_write_one(small, images, tmp_path):
    settings = given(small, images, tmp_path / "cache")
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    both = [fork.Process(target=lambda: results.put(str(files_of(settings)["train"]))) for _ in range(2)]
    for process in both:
        process.start()
    paths = {results.get(timeout=60) for _ in both}
    for process in both:
        process.join()
    assert len(paths) == 1 and data.inspect(paths.pop()).num_samples == 36
    assert [process.exitcode for process in both] == [0, 0]


def test_what_a_killed_writer_left_goes(small, images, tmp_path):
    settings = given(small, images, tmp_path / "cache")
    (source,) = sources(settings)
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / "cache" / f".{source.folder.name}.{os.uname().nodename}.{pid}").mkdir(parents=True)
    files_of(settings)
    left = [path.suffix for path in (tmp_path / "cache").iterdir() if path.name.startswith(".My")]
    assert left == [f".{os.getppid()}"]  # it lives


def test_mistakes_are_one_line(small, images, tmp_path, disk):
    settings = given(small, images, disk / "cache")
    (disk / "full").write_bytes(b"x" * (1500 * 1024 - 8192))
    with pytest.raises(UserError, match=r"data.cache .*: cannot be written \(no space left on device; make room"):
        files_of(settings)
    assert not [path for path in (disk / "cache").iterdir() if path.name != ".locks"]
    (images / "empty").mkdir()
    with pytest.raises(UserError, match=r"data.train .*: class folders without images: empty; remove"):
        inspect_data(settings)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=f"data.train {tmp_path}/nothing: holds no images"):
        inspect_data(given(small, tmp_path / "nothing", disk / "cache"))


def test_an_unreadable_image_is_left_out_and_named(small, images, tmp_path, capsys):
    (images / "a" / "000.png").write_bytes(b"broken")
    files = files_of(given(small, images, tmp_path / "cache", "--data.val_share", "0"))
    assert data.inspect(files["train"]).num_samples == 39
    assert f"unreadable: {images}/a/000.png" in capsys.readouterr().err


def test_a_signal_is_heeded_at_once():
    with StopFlag() as should_stop:
        with pytest.raises(Stopped), should_stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")
        with pytest.raises(Stopped), should_stop.at_once():
            pytest.fail("went on, though it was asked to stop before")


def test_ranks_train_on_a_folder_and_go_on_when_the_cache_was_lost(small, images, tmp_path):
    options = ["--data.train", str(images), "--data.cache", str(tmp_path / "cache"), "--train.save_every", "2"]
    options += ["--train.steps", "4", "--train.batch_size", "8"]
    first = run_trainer(small, tmp_path / "run", 2, *options, "--dry_run")
    assert first.code == 0 and "would be written to" in first.out and not (tmp_path / "cache").exists(), first.err
    run = run_trainer(small, tmp_path / "run", 2, *options, ranks=2)
    assert run.code == 0, run.err
    assert run.err.count("4 of 40 are held out") == 1 and len(run.lines("val")) == 2
    lineage = json.loads((run.folder / "export/config.json").read_text())["lineage"]
    assert lineage["data"][-1]["train"] == "My photos"
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(run.folder / "export")
    shutil.rmtree(run.folder / "checkpoints/step-00000004")
    again = run_trainer(small, tmp_path / "run", 2, *options)
    assert again.code == 0 and "from step 2" in again.err, again.err
    Image.open(images / "b" / "001.png").save(images / "a" / "000.png")
    shutil.rmtree(run.folder / "export")
    other = run_trainer(small, tmp_path / "run", 2, *options)
    assert "is not what this run had up to step 4" in other.error
