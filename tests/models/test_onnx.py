"""Models out of PyTorch: each operator, each kind of model, and what a file says of itself, run by onnxruntime."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from models import ADDITIONS, OPERATORS, Segmenter, build_head, linearize, save
from models.onnx import COREML, TENSORRT, export, main, undocumented

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 4}
VIT = "vit_tiny_patch16_224"
INPUT = {"image_size": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "crop_pct": 0.8}


def tiny(name: str = VIT) -> nn.Module:
    """Random weights, with positions large enough to be seen."""
    torch.manual_seed(0)
    vit = timm.create_model(name, **TINY).eval()
    for parameter in vit.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return vit


def run(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


PAIRS = [*((name, ()) for name in OPERATORS), *(("elu1", (name,)) for name in ADDITIONS)]
# Its convolution has as many groups as there are images, and ONNX's a fixed number: with a fixed batch it is exported.
PAIRS.remove(("elu1", ("local_dynamic",)))


class Each(nn.Module):
    """A ViT of each operator, side by side in one graph: [B, 3, H, W] -> [B, operators, classes]."""

    def __init__(self) -> None:
        super().__init__()
        vit = tiny()
        self.num_classes, self.pretrained_cfg = vit.num_classes, vit.pretrained_cfg
        self.vits = nn.ModuleList(linearize(vit, name, additions=more) for name, more in PAIRS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([vit(images) for vit in self.vits], 1)


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    model, path = Each(), tmp_path_factory.mktemp("each") / "each.onnx"
    return model, path, export(model, path, image_size=16, dynamic=["batch"])


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=["+".join((name, *more)) for name, more in PAIRS])
@torch.no_grad()
def test_each_operator_and_addition(each, index):
    model, path, _ = each
    for count in (1, 3):
        images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        got, expected = run(path, images)[:, index], model.vits[index](images)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * max(1, expected.abs().max().item()))


def test_graphs_of_linear_attention_are_of_documented_operators(each):
    operators = each[2].operators
    assert undocumented(operators, TENSORRT) == []
    # onnxruntime runs these on the processor, between parts that CoreML runs.
    assert set(undocumented(operators, COREML)) <= ELSEWHERE


ELSEWHERE = {
    "Abs", "Expand", "Flatten", "Gather", "Greater", "Less", "Log", "Neg", "Pad", "ReduceL2", "ReduceLogSumExp",
    "ReduceMin", "Where",
}  # fmt: skip


@pytest.mark.parametrize("name", [VIT, "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_any_batch_and_size(name, tmp_path):
    vit = linearize(tiny(name))
    path = tmp_path / "vit.onnx"
    done = export(vit, path, dynamic=["batch", "size"])
    assert done.checked == [(1, 3, 16, 16), (3, 3, 16, 16), (3, 3, 32, 24)] and done.difference <= done.allowed
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(run(path, images), vit(images), rtol=0, atol=1e-4)
    vit.set_input_size(img_size=(40, 16))
    images = torch.randn(1, 3, 40, 16)
    torch.testing.assert_close(run(path, images), vit(images), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_segmenter_takes_sizes_that_no_patch_divides(tmp_path):
    model = Segmenter(linearize(tiny()), build_head("linear", 32, 3)).eval()
    path = tmp_path / "segmenter.onnx"
    export(model, path, dynamic=["batch", "size"])
    for shape in ((1, 3, 16, 16), (3, 3, 21, 34)):
        images = torch.randn(shape)
        got = run(path, images)
        assert got.shape == (shape[0], 3, *shape[2:])
        torch.testing.assert_close(got, model(images), rtol=0, atol=1e-4)


def written(folder: Path, linear_blocks: list[int]) -> Path:
    vit = tiny() if not linear_blocks else linearize(tiny())
    save(folder, vit.state_dict(), {
        "backbone": {"name": VIT, "kwargs": TINY},
        "attention": {"feature_map": "elu1", "linear_blocks": linear_blocks},
        "input": INPUT, "classes": list("abcd"), "lineage": {},
    })  # fmt: skip
    return folder


def test_the_command(tmp_path, capsys):
    out = tmp_path / "half.onnx"
    softmax = written(tmp_path / "export", [])  # the baseline, by the same command
    assert main([str(softmax), str(out), "--image_size", "16", "24", "--half"]) == 0
    told = capsys.readouterr().out
    assert "operators: " in told and "Softmax 1" in told and "TensorRT documents all of them" in told
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said["image_size"] == [16, 24] and said["mean"] == [0.4, 0.5, 0.6] and said["classes"] == list("abcd")
    assert said["std"] == [0.2] * 3 and said["crop_pct"] == 0.8 and said["interpolation"] == "box"
    assert session.get_inputs()[0].shape == [1, 3, 16, 24] and session.get_outputs()[0].name == "logits"
    logits = session.run(None, {"images": np.zeros((1, 3, 16, 24), np.float32)})[0]
    assert logits.dtype == np.float32 and sorted(os.listdir(tmp_path)) == ["export", "half.onnx"]


@torch.no_grad()
def test_a_saved_program(tmp_path):
    vit, path = linearize(tiny()), tmp_path / "vit.pt2"
    done = export(vit, path, dynamic=["batch"], format="program")
    said = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=said).module()
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(program(images), vit(images), rtol=0, atol=1e-4)
    assert json.loads(said["metadata.json"]) == done.metadata and not any(
        "attention" in name for name in done.operators
    )


def test_mistakes_are_one_line(tmp_path, capsys):
    folder = written(tmp_path / "export", [0])
    for arguments, said in {
        ("vit_none", "a.onnx"): "vit_none: no folder of an export, and no name of timm's",
        (folder, "a.pt"): "a.pt: the name of a file of format onnx ends with .onnx",
        (folder, "a.onnx", "--format", "program"): "ends with .pt2",
        (folder, "a.onnx", "--format", "tflite"): "invalid choice: 'tflite'",
        (folder, "nowhere/a.onnx"): "its folder does not exist",
        (folder, "a.onnx", "--dynamic", "batch,width"): "dynamic 'width': unknown; choose among batch, size",
        (folder, "a.onnx", "--image_size", "20"): "--image_size (20, 20): not a multiple of the patch size 8",
        (folder, "a.onnx", "--image_size", "16", "16", "16"): "give a side, or height and width",
        (folder, "a.onnx", "--batch_size", "0"): "batch_size 0: not a number of images",
        (folder, "a.onnx", "--untrained"): "--untrained: an export has weights",
    }.items():
        model, out, *rest = arguments
        try:
            status = main([str(model), str(tmp_path / out), *rest])
        except SystemExit as end:
            status = end.code
        told = capsys.readouterr()
        assert status == 2 and told.out == "" and said in told.err and told.err.count("\n") == 1, (arguments, told.err)
    with pytest.raises(ValueError, match=r"dynamic size: .* rows and columns"):
        export(linearize(tiny(), "mhla"), tmp_path / "a.onnx", dynamic=["size"])
    assert os.listdir(tmp_path) == ["export"]


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("models.onnx.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"differs from the model by .* nothing was written"):
        export(linearize(tiny()), tmp_path / "vit.pt2", format="program")
    assert os.listdir(tmp_path) == []


def test_without_onnxruntime(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main([VIT, str(tmp_path / "a.onnx"), "--untrained"]) == 2
    assert capsys.readouterr().err == "error: format onnx needs onnxruntime: pip install onnxruntime\n"
