"""A model out of PyTorch, `python -m models.onnx EXPORT OUT.onnx`: ONNX, a saved program or an AOTInductor package.

What is written was run and agrees with the model; what does not agree is not written. Linear attention is matrix
products and element-wise functions alone, so an engine has no fused attention kernel to choose, or to get wrong.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from .backbones import take_any_size
from .checkpoints import one_line, pair
from .linear_attention import LinearAttention
from .segmenter import Segmenter, backbone_of
from .sources import is_name, open_model

FORMATS = {"onnx": ".onnx", "program": ".pt2", "aoti": ".pt2"}
DYNAMIC = ("batch", "size")
OPSET = 20  # the last one that TensorRT 10 documents
# Of the largest absolute output, where that is above 1: what the file may differ by from the model in fp32.
TOLERANCE = 1e-4
TOLERANCE_HALF = 2e-2

# Operators of ONNX that TensorRT 10 documents (onnx-tensorrt, docs/operators.md, 10.0). It has no cubic Resize.
TENSORRT = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu Clip
Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div
Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm
GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization GRU HardSigmoid
HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log
LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg
NonMaxSuppression NonZero Not OneHot Or Pad Pow PRelu QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
ReverseSequence RNN RoiAlign Round Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice
Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
Unsqueeze Upsample Where Xor
"""
# Those that onnxruntime's CoreML provider documents for ML programs (coreml_supported_mlprogram_ops.md).
COREML = """
Add ArgMax AveragePool Cast Ceil Clip Concat Constant Conv ConvTranspose Cos DepthToSpace Div Elu Erf Exp GatherND
Gelu Gemm GlobalAveragePool GlobalMaxPool GridSample GroupNormalization HardSigmoid Identity InstanceNormalization
LayerNormalization LeakyRelu MatMul Max MaxPool Mul Pow PRelu Range Reciprocal ReduceMax ReduceMean ReduceSum Relu
Reshape Resize Round Shape Sigmoid Sin Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze
"""


@dataclass
class Exported:
    """What `export` wrote.

    Attributes:
        metadata: as the file holds it, each value JSON.
        operators: of the graph, and how often each stands there.
        checked: shapes of the images [B, 3, H, W] that file and model were compared on.
        difference: the largest absolute one between their outputs.
        allowed: what it was allowed to be there.
    """

    path: Path
    metadata: dict[str, str]
    operators: Counter[str]
    checked: list[tuple[int, ...]]
    difference: float
    allowed: float


def export(
    model: nn.Module,
    out: str | Path,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    dynamic: Collection[str] = (),
    half: bool = False,
    format: str = "onnx",
) -> Exported:
    """Write `model`, compared with what it gives here, as a file that runs without its code.

    The file takes `images` [B, 3, H, W] and gives one output, both fp32, also with `half`. Its metadata say how the
    images are made: `mean`, `std`, `image_size`, `crop_pct`, `crop_mode`, `interpolation`, and `classes` and
    `palette` where they are known. ONNX has them as metadata properties, a program as its extra file
    `metadata.json`, an AOTInductor package as its metadata.

    Args:
        model: a timm model or a `Segmenter`, in fp32; it is left as it is.
        image_size: pixels, a side or (height, width), that `model` takes; by default what it was built for.
        batch_size: images; with a dynamic batch any number.
        dynamic: `batch`, `size`: what may differ from call to call.
        half: compute in fp16, the states of linear attention in fp32.
        format: `onnx`, `program` (`torch.export.save`) or `aoti` (for processors like this machine's).

    Raises:
        ValueError: the model cannot be exported so, or the file differs from it by more than `TOLERANCE`
            (`TOLERANCE_HALF`) of the largest output.
    """
    out, dynamic = Path(out), tuple(dynamic)
    _check(out, dynamic, format, batch_size)
    reference = copy.deepcopy(model).float().eval()
    vit = backbone_of(reference)
    size = pair(image_size or _built_for(vit))
    patch = getattr(getattr(vit, "patch_embed", None), "patch_size", (32, 32))
    if "size" in dynamic:
        _let_size_vary(reference)
    deployed = Deployed(_halved(reference) if half else reference, torch.float16 if half else torch.float32).eval()
    metadata = {key: json.dumps(value) for key, value in _metadata(model, size).items()}

    # What is traced is nothing special in a dimension that varies: one image, a square, the size that it is built for.
    sample = (2 if "batch" in dynamic else batch_size, 3, size[0], size[1] + patch[1] * ("size" in dynamic))
    shapes = [(batch_size, 3, *size)]
    if "batch" in dynamic:
        shapes = [(count, 3, *size) for count in (1, 3)]
    if "size" in dynamic:
        shapes.append((shapes[-1][0], 3, size[0] + 2 * patch[0], size[1] + patch[1]))

    with _quiet(), torch.no_grad():
        program = _traced(deployed, sample, dynamic)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
            aside = Path(folder) / out.name
            write = {"onnx": _write_onnx, "program": _write_program, "aoti": _write_aoti}[format]
            try:
                run, operators = write(program, aside, metadata, "logits" if _has_classes(model) else "features")
            except Exception as error:
                raise ValueError(f"{out}: {format} cannot express this model ({one_line(error)})") from error
            difference, allowed = _compare(run, reference, shapes, half, out)
            del run
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == out.name):
                os.replace(file, out.parent / file.name)
    return Exported(out, metadata, operators, shapes, difference, allowed)


class Deployed(nn.Module):
    """What the file computes: fp32 images to fp32 outputs, whatever the model computes in."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> what the model gives."""
        return self.model(images.to(self.dtype)).float()


def _check(out: Path, dynamic: Collection[str], format: str, batch_size: int) -> None:
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: unknown; choose one of {', '.join(FORMATS)}")
    if unknown := [word for word in dynamic if word not in DYNAMIC]:
        raise ValueError(f"dynamic {unknown[0]!r}: unknown; choose among {', '.join(DYNAMIC)}")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: not a number of images")
    if out.suffix != FORMATS[format]:
        raise ValueError(f"{out}: the name of a file of format {format} ends with {FORMATS[format]}")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: its folder does not exist; make it first")
    if out.is_dir():
        raise ValueError(f"{out}: a folder; name a file")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise ValueError(f"format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _built_for(vit: nn.Module) -> tuple[int, int]:
    built = getattr(getattr(vit, "patch_embed", None), "img_size", None)
    return tuple(built or resolve_data_config(pretrained_cfg=vit.pretrained_cfg)["input_size"][1:])


def _has_classes(model: nn.Module) -> bool:
    return isinstance(model, Segmenter) or getattr(model, "num_classes", 0) > 0


def _metadata(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    described = getattr(model, "pretrained_cfg", None) or backbone_of(model).pretrained_cfg
    known = resolve_data_config(pretrained_cfg=described)
    said = {key: known[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}
    said |= {"image_size": size, "layout": "RGB, [batch, 3, height, width], (pixel / 255 - mean) / std"}
    classes = getattr(model, "classes", None) or described.get("label_names")
    said |= {"classes": list(classes)} if classes else {}
    said |= {"palette": model.palette} if getattr(model, "palette", None) else {}
    return said


def _let_size_vary(model: nn.Module) -> None:
    """Raises ValueError where something in `model` holds for one size."""
    vit = backbone_of(model)
    grids = [module for module in vit.modules() if isinstance(module, LinearAttention) and module.needs_grid]
    if grids:
        raise ValueError("dynamic size: an operator or addition of this model lays patches out in rows and columns, "
                         "which an export fixes; export a file per image size")  # fmt: skip
    if hasattr(vit, "patch_embed"):
        try:
            take_any_size(vit)
        except AttributeError as error:
            raise ValueError(f"dynamic size: {type(vit).__name__} takes one size; export a file per size") from error


def _halved(model: nn.Module) -> nn.Module:
    """A copy in fp16, but for rotary positions: sines of large angles need more digits."""
    halved = copy.deepcopy(model).half()
    rope = getattr(backbone_of(model), "rope", None)
    if rope is not None:
        backbone_of(halved).rope = copy.deepcopy(rope)
    return halved


def _traced(model: nn.Module, shape: tuple[int, ...], dynamic: Collection[str]) -> torch.export.ExportedProgram:
    free = [0] * ("batch" in dynamic) + [2, 3] * ("size" in dynamic)
    dims = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    try:
        return torch.export.export(model, (torch.zeros(shape),), dynamic_shapes=(dims,), strict=False)
    except Exception as error:
        if not dynamic:
            raise ValueError(f"torch.export cannot trace this model ({one_line(error)})") from error
        said = f"dynamic {','.join(dynamic)}: this model cannot be exported so; export a file per shape"
        raise ValueError(f"{said} ({one_line(error)})") from error


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str], output: str
) -> tuple[Callable[[Tensor], Tensor], Counter[str]]:
    import onnxruntime

    written = torch.onnx.export(
        program, dynamo=True, verbose=False, opset_version=OPSET, input_names=["images"], output_names=[output]
    )
    graph = written.model.graph
    dims = zip(graph.inputs[0].shape, ("batch", "channels", "height", "width"), strict=True)
    written.rename_axes({dim: name for dim, name in dims if not isinstance(dim, int)})
    written.model.metadata_props.update(metadata)
    written.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run, Counter(_operator(node) for node in graph.all_nodes())


def _operator(node: Any) -> str:
    """The type of a node; of a Resize its mode too, because engines differ in which they have."""
    if node.op_type != "Resize":
        return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "nearest"
    return "Resize" if mode in ("nearest", "linear") and not _antialiased(node) else f"Resize({mode})"


def _antialiased(node: Any) -> bool:
    return "antialias" in node.attributes and bool(node.attributes["antialias"].as_int())


def _write_program(
    program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str], output: str
) -> tuple[Callable[[Tensor], Tensor], Counter[str]]:
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})
    return torch.export.load(path).module(), _of_program(program)


def _write_aoti(
    program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str], output: str
) -> tuple[Callable[[Tensor], Tensor], Counter[str]]:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    operators = _of_program(program)
    aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": dict(metadata)}
    )
    return aoti_load_package(str(path)), operators


def _of_program(program: torch.export.ExportedProgram) -> Counter[str]:
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    nodes = (node for graph in graphs for node in graph.nodes if node.op == "call_function")
    return Counter(str(node.target) for node in nodes if isinstance(node.target, torch._ops.OpOverload))


def _compare(
    run: Callable[[Tensor], Tensor], reference: nn.Module, shapes: Sequence[tuple[int, ...]], half: bool, out: Path
) -> tuple[float, float]:
    """The largest difference and what it was allowed to be. Raises ValueError where it is more."""
    worst = (0.0, 0.0)
    for shape in shapes:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = reference(images)
        try:
            got = run(images)
        except Exception as error:
            raise ValueError(f"{out}: does not take images {list(shape)} ({one_line(error)}); export a file per shape; "
                             "nothing was written") from error  # fmt: skip
        if got.shape != expected.shape:
            raise ValueError(f"{out}: gives {list(got.shape)}, the model {list(expected.shape)}; nothing was written")
        difference = (got - expected).abs().max().item()
        allowed = (TOLERANCE_HALF if half else TOLERANCE) * max(1.0, expected.abs().max().item())
        if not difference <= allowed:
            mend = "; leave out half" if half else ""
            raise ValueError(f"{out}: differs from the model by {difference:.1e} for images {list(shape)}, "
                             f"{allowed:.1e} is allowed; nothing was written{mend}")  # fmt: skip
        worst = max(worst, (difference, allowed))
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx and the compilers behind it tell their progress and their guesses on every channel."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def undocumented(operators: Collection[str], engine: str) -> list[str]:
    """Those of `operators` that are not in the list of an engine, such as `TENSORRT`."""
    return sorted(set(operators) - set(engine.split()))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(message))


def _fail(message: object) -> int:
    said = " ".join(str(message).split())
    for setting, here in (("data.image_size", "--image_size"), ("teacher.name ", ""), *_OPTIONS):
        said = said.replace(setting, here, 1)
    print(f"error: {said}", file=sys.stderr)
    return 2


_OPTIONS = [("dynamic size:", "--dynamic size:"), ("leave out half", "leave out --half")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    name = __spec__.name
    parser = _Parser(
        prog=f"python -m {name}", description="Write a model as ONNX, a saved program or an AOTInductor package."
    )
    parser.add_argument("model", help="an export's folder, hf-hub:OWNER/NAME of an export, or a name of timm's")
    parser.add_argument("out", help="the file to write, such as student.onnx")
    parser.add_argument(
        "--format", choices=list(FORMATS), default="onnx", help="default onnx; the others end with .pt2"
    )
    parser.add_argument(
        "--image_size", type=int, nargs="+", metavar="PIXELS", help="a side, or height and width (default: the model's)"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="images per call (default 1)")
    parser.add_argument("--dynamic", default="", metavar="batch,size", help="what may differ from call to call")
    parser.add_argument("--half", action="store_true", help="compute in fp16; images and outputs stay fp32")
    parser.add_argument("--untrained", action="store_true", help="of a timm name: random weights, to measure speed")
    given = parser.parse_args(arguments)
    size = given.image_size
    try:
        if size is not None and (len(size) > 2 or min(size) < 1):
            raise ValueError(f"--image_size {' '.join(map(str, size))}: give a side, or height and width, in pixels")
        size = None if size is None else (size[0], size[-1])
        dynamic = [word for word in given.dynamic.split(",") if word]
        _check(Path(given.out), dynamic, given.format, given.batch_size)
        model = _model(given.model, size, given.untrained)
        done = export(model, given.out, size, given.batch_size, dynamic, given.half, given.format)
    except (ValueError, OSError) as error:
        return _fail(error)
    _tell(done, given.format)
    return 0


def _model(source: str, size: tuple[int, int] | None, untrained: bool) -> nn.Module:
    """Raises ValueError or FileNotFoundError where `source` is nothing that can be had."""
    if untrained and not is_name(source):
        raise ValueError("--untrained: an export has weights; leave it out, or give a name of timm's")
    try:
        return open_model(source, size, pretrained=not untrained)
    except ValueError as error:
        said = str(error).partition("; download them elsewhere")[0]
        if not is_name(source):
            raise
        raise ValueError(f"{said}; --untrained exports random weights" if "hub" in said else said) from error


def _tell(done: Exported, format: str) -> None:
    by = "onnxruntime" if format == "onnx" else "torch"
    shapes = ", ".join("x".join(map(str, shape)) for shape in done.checked)
    print(f"wrote {done.path} ({done.path.stat().st_size / 1e6:.1f} MB)")
    print(f"checked by {by}: differs from the model by {done.difference:.1e}, allowed {done.allowed:.1e} ({shapes})")
    print("operators: " + ", ".join(f"{name} {count}" for name, count in sorted(done.operators.items())))
    if format != "onnx":
        return
    for engine, documented in (("TensorRT", TENSORRT), ("onnxruntime's CoreML provider", COREML)):
        beyond = undocumented(done.operators, documented)
        print(f"{engine} documents " + (f"all but {', '.join(beyond)}" if beyond else "all of them"))


if __name__ == "__main__":
    sys.exit(main())
