"""Data sets as they are distributed, in small: what is there is read, and nothing hostile is followed or run."""

import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data import inspect
from data.layouts import CIFAR10, Arrays, Files, open_source
from data.sources import ImageFolder
from data.write import main

RNG = np.random.default_rng(0)


def pixels(count: int) -> np.ndarray:
    """uint8 [n, 3072] in CIFAR's order: red, green, blue, each row by row."""
    return RNG.integers(0, 256, (count, 3072), dtype=np.uint8)


def dump(value, path: Path, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(value, protocol=protocol))


def cifar10(root: Path, protocol: int = 2) -> dict[str, tuple[np.ndarray, list[int]]]:
    """A tree with 4 images a batch; keys are bytes, as Python 2 wrote them."""
    root.mkdir(parents=True)
    batches = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batches[name] = pixels(4), RNG.integers(0, 10, 4).tolist()
        data, labels = batches[name]
        names = [b"x.png"] * 4
        dump({b"batch_label": b"1", b"labels": labels, b"data": data, b"filenames": names}, root / name, protocol)
    dump({b"label_names": [name.encode() for name in CIFAR10], b"num_vis": 3072}, root / "batches.meta", protocol)
    return batches


def check(dataset: Arrays, images: np.ndarray, labels: list[int]) -> None:
    assert len(dataset) == len(images)
    for index in range(len(images)):
        image, label = dataset[index]
        assert np.array_equal(image, images[index].reshape(3, 32, 32).transpose(1, 2, 0)) and label == labels[index]


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar10_pickles(tmp_path, protocol):
    batches = cifar10(tmp_path / "cifar-10-batches-py", protocol)
    train = [batches[f"data_batch_{i}"] for i in range(1, 6)]
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        dataset = open_source(root)
        check(dataset, np.concatenate([data for data, _ in train]), [label for _, labels in train for label in labels])
        assert dataset.classes == list(CIFAR10) and "cifar, its train split" in dataset.why
        check(open_source(root, split="test"), *batches["test_batch"])
    with pytest.raises(ValueError, match="split 'val': cifar has only train and test"):
        open_source(tmp_path, split="val")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3: no such file, which cifar has as it is distributed"):
        open_source(tmp_path)


def test_cifar10_binary(tmp_path):
    root = tmp_path / "cifar-10-batches-bin"
    root.mkdir()
    (root / "batches.meta.txt").write_text("\n".join(CIFAR10) + "\n\n")
    data, labels = pixels(3), np.array([[9], [0], [4]], np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        np.hstack([labels, data]).tofile(root / f"{name}.bin")
    check(open_source(tmp_path, split="test"), data, [9, 0, 4])
    assert len(open_source(tmp_path)) == 15 and open_source(tmp_path).classes == list(CIFAR10)
    with open(root / "test_batch.bin", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"test_batch\.bin: truncated"):
        open_source(tmp_path, split="test")


def test_cifar100(tmp_path):
    data, fine = pixels(3), [99, 0, 41]
    names = [f"class_{i}" for i in range(100)]
    python, binary = tmp_path / "a" / "cifar-100-python", tmp_path / "b" / "cifar-100-binary"
    python.mkdir(parents=True)
    binary.mkdir(parents=True)
    for split in ("train", "test"):
        dump({b"fine_labels": fine, b"coarse_labels": [1, 2, 3], b"data": data}, python / split)
        np.hstack([np.array([[1, 99], [2, 0], [3, 41]], np.uint8), data]).tofile(binary / f"{split}.bin")
    dump({b"fine_label_names": [name.encode() for name in names], b"coarse_label_names": []}, python / "meta")
    (binary / "fine_label_names.txt").write_text("\n".join(names))
    for root in ("a", "b"):
        for split in ("train", "test"):
            dataset = open_source(tmp_path / root, split=split)
            check(dataset, data, fine)
            assert dataset.classes == names


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_run_nothing(tmp_path, protocol):
    root = tmp_path / "cifar-10-batches-py"
    cifar10(root)
    for value in (Malicious(tmp_path / "executed"), {b"data": Malicious(tmp_path / "executed"), b"labels": [1]}):
        dump(value, root / "test_batch", protocol)
        with pytest.raises(
            ValueError, match=r"test_batch: cannot be read as a batch of CIFAR \(it asks for posix\.system"
        ):
            open_source(tmp_path, split="test")
    dump({b"label_names": Malicious(tmp_path / "executed")}, root / "batches.meta", protocol)
    with pytest.raises(ValueError, match=r"batches\.meta: cannot be read as a batch of CIFAR"):
        open_source(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "value",
    [
        [1],
        {b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3072), object), b"labels": [0, 1]},
        {b"data": np.zeros((2, 30), np.uint8), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1, 2]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, -1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "cat"]},
        {b"data": np.zeros((2, 3072), np.uint8)},
        {b"data": b"text", b"labels": [0]},
    ],
)
def test_pickles_of_something_else_are_one_line(tmp_path, value):
    cifar10(tmp_path / "cifar-10-batches-py")
    dump(value, tmp_path / "cifar-10-batches-py" / "test_batch")
    with pytest.raises(ValueError, match="cifar") as error:
        open_source(tmp_path, split="test")
    assert "\n" not in str(error.value)
    whole = (tmp_path / "cifar-10-batches-py" / "data_batch_1").read_bytes()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="test_batch: cannot be read"):
        open_source(tmp_path, split="test")


def test_cifar10c(tmp_path):
    images = RNG.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)  # 4 images at 5 severities
    labels = np.tile(np.array([3, 1, 9, 0], np.uint8), 5)
    np.save(tmp_path / "contrast.npy", images)
    np.save(tmp_path / "snow.npy", images[::-1])
    np.save(tmp_path / "labels.npy", labels)
    dataset = open_source(tmp_path, corruption=("contrast", 3))
    assert len(dataset) == 4 and dataset.corrupted and dataset.classes == list(CIFAR10)
    assert all(np.array_equal(dataset[i][0], images[8 + i]) and dataset[i][1] == labels[i] for i in range(4))
    for corruption in (None, ("fog", 3), ("contrast", 6)):
        with pytest.raises(ValueError, match=r"say which with --corrupt NAME --severity 1\.\.5, of contrast, snow"):
            open_source(tmp_path, corruption=corruption)
    np.save(tmp_path / "snow.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"snow\.npy: not a file of numpy's, or damaged"):
        open_source(tmp_path, corruption=("snow", 1))
    np.save(tmp_path / "snow.npy", images[:15])
    with pytest.raises(ValueError, match=r"labels\.npy: not the labels of snow\.npy"):
        open_source(tmp_path, corruption=("snow", 1))
    content = (tmp_path / "contrast.npy").read_bytes()
    (tmp_path / "contrast.npy").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"contrast\.npy: not a file of numpy's, or damaged"):
        open_source(tmp_path, corruption=("contrast", 1))

    (tmp_path / "contrast.npy").write_bytes(content)
    out = tmp_path / "x.beton"
    assert main([str(tmp_path), str(out), "--corrupt", "contrast", "--severity", "5", "--raw_share", "1"]) == 0
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert inspect(out).num_samples == 4 and images[17].tobytes() in out.read_bytes()  # not corrupted once more


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path, quality=100)


def test_flowers102(tmp_path):
    for number in range(1, 7):
        save(tmp_path / "jpg" / f"image_{number:05d}.jpg", 40 * number)
    savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[3, 1, 2, 102, 3, 1]], np.uint8)})
    savemat(tmp_path / "setid.mat", {"trnid": [[6, 2]], "valid": [[1]], "tstid": [[3, 4, 5]]})
    wanted = {"train": [(240, 0), (80, 0)], "val": [(40, 2)], "test": [(120, 1), (160, 101), (200, 2)]}
    for split, items in wanted.items():
        dataset = open_source(tmp_path, split=split)
        assert isinstance(dataset, Files) and len(dataset) == len(items)
        for (image, label), (value, wanted_label) in zip((dataset[i] for i in range(len(items))), items, strict=True):
            assert abs(int(image[0, 0, 0]) - value) < 4 and label == wanted_label
    savemat(tmp_path / "setid.mat", {"trnid": [[7]], "valid": [[1]], "tstid": [[0]]})
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=r"setid\.mat: does not fit imagelabels\.mat"):
            open_source(tmp_path, split=split)
    (tmp_path / "setid.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(300))
    with pytest.raises(ValueError, match=r"setid\.mat: cannot be read as a MATLAB file|without 'trnid'"):
        open_source(tmp_path)


def test_pets(tmp_path):
    for name, value in (("Abyssinian_1", 10), ("great_pyrenees_12", 90), ("Abyssinian_2", 200)):
        save(tmp_path / "images" / f"{name}.jpg", value)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\ngreat_pyrenees_12 2 2 1\n")
    (tmp_path / "annotations" / "test.txt").write_text("#Image CLASS-ID SPECIES BREED ID\nAbyssinian_2 1 1 1\n")
    dataset = open_source(tmp_path)
    assert dataset.classes == ["Abyssinian", "great_pyrenees"] and [dataset[i][1] for i in range(2)] == [0, 1]
    assert abs(int(dataset[1][0][0, 0, 0]) - 90) < 4 and dataset.name(1).endswith("great_pyrenees_12.jpg")
    assert len(open_source(tmp_path, split="test")) == 1
    for line, said in (
        ("../../secret 1 1 1", "leads outside"),
        ("Abyssinian_1", "is not a name and a class"),
        ("Abyssinian_1 0 1 1", "has a class below 1"),
    ):
        (tmp_path / "annotations" / "trainval.txt").write_text(f"Abyssinian_1 1 1 1\n{line}\n")
        with pytest.raises(ValueError, match=rf"trainval\.txt: line 2 {said}"):
            open_source(tmp_path)


def test_domainnet(tmp_path):
    files = {"sketch/cat/1.png": 10, "sketch/dog/2.png": 80, "sketch/dog/3.png": 200}
    for name, value in files.items():
        save(tmp_path / name, value)
    (tmp_path / "sketch_train.txt").write_text("sketch/dog/2.png 1\nsketch/cat/1.png 0\n")
    (tmp_path / "sketch_test.txt").write_text("sketch/dog/3.png 1\n")
    dataset = open_source(tmp_path / "sketch")
    assert dataset.classes == ["cat", "dog"] and [dataset[i][1] for i in range(2)] == [1, 0]
    assert dataset[0][0][0, 0, 0] == 80
    test = open_source(tmp_path / "sketch", "domainnet", "test")
    assert len(test) == 1 and test[0][1] == 1 and test.classes is None  # one class of two is no list of classes
    for line in ("/etc/passwd 0", "../outside/1.png 0", "sketch/../../1.png 0"):
        (tmp_path / "sketch_train.txt").write_text(f"{line}\n")
        with pytest.raises(ValueError, match=r"sketch_train\.txt: line 1 leads outside"):
            open_source(tmp_path / "sketch")
    assert isinstance(open_source(tmp_path / "sketch", "folder"), ImageFolder)


def test_folders_stay_folders(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        save(tmp_path / name, 3)
    assert open_source(tmp_path).classes == ["a", "b"]
    with pytest.raises(ValueError, match=r"split train: .* is a folder of images, without splits"):
        open_source(tmp_path, split="train")
    with pytest.raises(FileNotFoundError, match=r"trainval\.txt: no such file, which pets has as it is distributed"):
        open_source(tmp_path, "pets")
    with pytest.raises(ValueError, match="layout 'imagenet': must be folder, cifar, cifar10c"):
        open_source(tmp_path, "imagenet")


def test_the_command_line(tmp_path, capsys):
    cifar10(tmp_path / "cifar-10-batches-py")
    out = tmp_path / "x.beton"
    shifted = ["--corrupt", "speckle_noise", "--severity", "2", "--seed", "4", "--raw_share", "1"]
    assert main([str(tmp_path), str(out), "--split", "test", *shifted]) == 0
    assert "4 images, cifar, its test split" in capsys.readouterr().out
    assert inspect(out).classes == list(CIFAR10) and inspect(out).num_samples == 4
    for arguments, said in (
        (["--corrupt", "snow"], "give both"),
        (["--corrupt", "rain", "--severity", "1"], "no such corruption"),
        (["--split", "val"], "cifar has only train and test"),
        (["--unlabelled"], "whose labels are known"),
        (["--layout", "flowers102"], "imagelabels.mat: no such file"),
    ):
        assert main([str(tmp_path), str(out), *arguments]) == 2
        assert said in capsys.readouterr().err
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
