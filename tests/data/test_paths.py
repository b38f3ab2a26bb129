"""Paths: home folders everywhere, and a mistake names what is there and how to mend it."""

import tarfile

import pytest

from data import choose_order, eval_loader, inspect
from data.class_table import read_table
from data.layouts import open_source
from data.paths import did_you_mean, existing_folder, expand
from data.resolve import resolve
from data.segmentation import open_pairs
from data.sources import ImageFolder
from data.write import main, write
from tests.support.pictures import picture


def test_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(ImageFolder("~/images"), "~/new/x.beton", workers=1, progress=False)
    assert inspect("~/new/x.beton").num_samples == 6 and len(open_source("~/images")) == 6
    assert resolve("~/new/x.beton", "val") == tmp_path / "new/x.beton" and choose_order("~/new/x.beton", "auto")
    assert eval_loader("~/new/x.beton", image_size=8, batch_size=2, workers=1).num_samples == 6
    (tmp_path / "t.csv").write_text("0,a\n")
    assert read_table("~/t.csv").names == ["a"]
    assert len(open_pairs("~/images", masks="~/images", classes="~/t.csv")) == 6
    with pytest.raises(ValueError, match="~nobody_here/x: no such user"):
        expand("~nobody_here/x")


def test_near_names(tmp_path):
    for name in ("train.beton", "val.beton"):
        (tmp_path / name).write_bytes(b"")
    assert did_you_mean(tmp_path / "trian.beton") == f"; did you mean {tmp_path}/train.beton?"
    assert did_you_mean(tmp_path / "val") == f"; did you mean {tmp_path}/val.beton?"
    assert did_you_mean(tmp_path / "other") == did_you_mean(tmp_path / "none/x") == ""
    with pytest.raises(FileNotFoundError, match=r"no such file; did you mean .*/train\.beton\?; write one with"):
        inspect(tmp_path / "trian.beton")
    with pytest.raises(FileNotFoundError, match="did you mean digits"):
        inspect("digitz")
    with pytest.raises(FileNotFoundError, match=f"write it as one with python -m data.write {tmp_path} "):
        inspect(tmp_path)


def test_files_are_known_by_their_content(folder, tmp_path, capsys):
    with tarfile.open(tmp_path / "a.beton", "w") as file:
        file.add(folder)
    picture(0).save(tmp_path / "b.beton", "PNG")
    (tmp_path / "c.beton").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    for name, said in (("a", "a tar archive"), ("b", "a PNG image"), ("c", "a pointer of Git LFS")):
        with pytest.raises(ValueError, match=rf"{name}\.beton: is {said}.*, not a \.beton file"):
            inspect(tmp_path / f"{name}.beton")
    with pytest.raises(FileNotFoundError, match=r"a\.beton: no folder, but a tar archive; unpack it and give a folder"):
        existing_folder(tmp_path / "a.beton", "give a folder")
    write(ImageFolder(folder), tmp_path / "x.beton", workers=1, progress=False)
    assert main([str(tmp_path / "x.beton"), str(tmp_path / "y.beton")]) == 2
    assert "x.beton: no folder, but a .beton file" in capsys.readouterr().err
