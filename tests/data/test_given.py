"""Images as a user has them: which splits there are, what is held out, and when they count as changed."""

import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.given import find, hold_out, is_given, stamp
from tests.support.pictures import content, picture


def many(root, classes: str = "abc", count: int = 20):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(100 * label + i).save(root / name / f"{i:02}.png")
    return root


def test_which_settings_are_images(folder, tmp_path):
    assert is_given(str(folder)) and is_given("hf:owner/name") and is_given(tmp_path / "some.parquet")
    assert not is_given(None) and not is_given("digits:snow-3") and not is_given(str(tmp_path / "train.beton"))


def test_held_out_images_are_a_share_of_each_class_by_their_names_alone(tmp_path):
    images = find(str(many(tmp_path / "one")), tmp_path)["train"]
    stay, held = hold_out(images, 0.1)
    assert sorted([*stay, *held]) == list(range(60)) and np.bincount(images.labels[held]).tolist() == [2, 2, 2]
    files = {str(images.dataset.files[i]) for i in held}
    # Elsewhere, with a class beside them, they are the same.
    more = find(str(many(tmp_path / "two", "abcd")), tmp_path)["train"]
    again = {str(more.dataset.files[i]) for i in hold_out(more, 0.1)[1]}
    assert files == {name for name in again if not name.startswith("d")}
    part = images.part(held, "held out")
    assert len(part) == 6 and part.labels.tolist() == [0, 0, 1, 1, 2, 2] and part.expected(tmp_path).num_samples == 6
    pixels, label = part.dataset[5]
    assert label == 2 and np.array_equal(pixels, np.asarray(Image.open(part.dataset.name(5)).convert("RGB")))
    few = find(str(many(tmp_path / "few", "ab", 3)), tmp_path)["train"]
    assert len(hold_out(few, 0.1)[1]) == 0  # none, rather than a third


def test_folders_of_splits_are_taken_as_such(folder, tmp_path):
    many(tmp_path / "both" / "train", "ab", 2)
    many(tmp_path / "both" / "val", "ab", 1)
    many(tmp_path / "both" / "test", "ab", 3)
    found = find(str(tmp_path / "both"), tmp_path)
    assert {split: len(images) for split, images in found.items()} == {"train": 4, "val": 2}
    shutil.rmtree(tmp_path / "both" / "val")
    shutil.rmtree(tmp_path / "both" / "test")
    assert {split: len(images) for split, images in find(str(tmp_path / "both"), tmp_path).items()} == {"train": 4}
    (folder / "cat").rename(folder / "train")  # a means of transport
    assert find(str(folder), tmp_path)["train"].classes == ["ant", "train"]


def test_a_changed_image_gives_another_stamp(folder):
    before = stamp(str(folder))
    assert stamp(str(folder)) == before
    file = folder / "cat" / "0.png"
    about = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"x")  # of the same size, and then the same time
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    changed = stamp(str(folder))
    assert changed != before
    (folder / "cat" / ".hidden.png").write_text("other")
    assert stamp(str(folder)) == changed
    file.rename(folder / "ant" / "9.png")
    assert stamp(str(folder)) != changed
    (folder / "loop").symlink_to(folder)  # is not followed for ever
    assert len(stamp(str(folder))) == 64


def png(index: int) -> bytes:
    out = io.BytesIO()
    picture(index).save(out, "png")
    return out.getvalue()


def test_shards_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    from data.write import write

    rows = {"image": [{"bytes": png(i), "path": None} for i in range(6)], "label": [0, 1, 2, 0, 1, 2]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    shards = tmp_path / "shards"
    shards.mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(shards / "train-00000-of-00001.parquet")
    datasets.Dataset.from_dict({k: v[:2] for k, v in rows.items()}, features).to_parquet(shards / "validation.parquet")
    (tmp_path / "scratch").mkdir()
    found = find(str(shards), tmp_path / "scratch")
    assert {split: len(images) for split, images in found.items()} == {"train": 6, "val": 2}
    assert found["train"].classes == ["x", "y", "z"] and found["train"].labels.tolist() == rows["label"]
    part = found["train"].part(np.array([1, 5]), "two")
    write(part.dataset, tmp_path / "x.beton", raw_share=1.0, progress=False, **part.how())
    images, labels = content(tmp_path / "x.beton")
    assert labels == [1, 2] and np.array_equal(images[1], picture(5))

    tar = tmp_path / "train.tar"
    with tarfile.open(tar, "w") as file:
        for i in range(4):
            for suffix, text in (("png", png(i)), ("cls", str(i % 2).encode())):
                info = tarfile.TarInfo(f"{i:03}.{suffix}")
                info.size = len(text)
                file.addfile(info, io.BytesIO(text))
    of_tar = find(str(tar), tmp_path / "scratch")["train"]
    assert of_tar.labels.tolist() == [0, 1, 0, 1] and of_tar.classes is None
    write(of_tar.dataset, tmp_path / "y.beton", raw_share=1.0, progress=False, **of_tar.how())
    assert np.array_equal(content(tmp_path / "y.beton")[0][3], picture(3))
    before = stamp(str(tar))
    tar.write_bytes(tar.read_bytes())
    assert stamp(str(tar)) != before


def test_a_dataset_of_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    root, revision = tmp_path / "repository", "c" * 40
    (root / "data").mkdir(parents=True)
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "label": ["z", "x", "z"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features).to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")

    class Hub(http.server.BaseHTTPRequestHandler):
        """The hub, as far as `datasets` asks it for one dataset."""

        def do_GET(self):
            path, _, inside = self.path.partition("?")[0].partition(f"/{revision}")
            files = sorted(file for file in root.rglob("*") if file.is_file())
            if path.startswith("/api/datasets/someone/photos") and not path.endswith("/tree"):
                said = {
                    "id": "someone/photos",
                    "sha": revision,
                    "tags": [],
                    "private": False,
                    "downloads": 0,
                    "likes": 0,
                }
                said["siblings"] = [{"rfilename": str(file.relative_to(root))} for file in files]
                return self.send(200, json.dumps(said).encode())
            if path.endswith("/tree"):
                found = sorted((root / inside.strip("/")).iterdir())
                kinds = [{"type": "directory" if file.is_dir() else "file", "path": str(file.relative_to(root)),
                          "oid": "b" * 40, "size": file.stat().st_size} for file in found]  # fmt: skip
                return self.send(200, json.dumps(kinds).encode())
            file = root / inside.strip("/")
            there = "/resolve" in path and file.is_file()
            return self.send(200 if there else 404, file.read_bytes() if there else b"")

        do_HEAD = do_GET

        def send(self, code, body):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            for name, value in (
                {"X-Repo-Commit": revision, "ETag": f'"{Path(self.path).name}"'}.items() if code == 200 else ()
            ):
                self.send_header(name, value)
            if code == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = (
            "from data.given import find, stamp; found = find('hf:someone/photos', None); train = found['train']; "
            "print(stamp('hf:someone/photos'), *found, len(train), train.classes, train.labels, train.why)"
        )
        env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "*", "PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=200)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    said = "its split train, images of column image, labels of label"
    assert done.stdout.strip() == f"{revision} train 3 ['x', 'z'] [1 0 1] {said}"  # the test split is left


def test_what_does_not_fit_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="so where its masks are is not known; write them with"):
        find(str(folder), tmp_path, masks=True)
    with pytest.raises(ValueError, match=r"cannot be had|needs the package datasets") as error:
        find("hf:/no/such/dataset", tmp_path)
    assert "\n" not in str(error.value)
