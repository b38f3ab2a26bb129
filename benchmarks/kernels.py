"""The Triton kernels, built ahead of time for GPUs that need not be here.

`python -m benchmarks.kernels` compiles each kernel for sm_80 and sm_90 and prints registers, spills and shared memory.
It needs Triton and no GPU. `tests/models/kernels/interpreted.py`, and those of the convolution and of neighborhoods
beside it, count the bytes.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks.common import markdown
from models import kernels
from models.kernels import (
    convolution,
    neighborhood,
    pooled,
    triton_attention,
    triton_convolution,
    triton_neighborhood,
    triton_pooled,
)

PASSES = {"forward": ("first", "second"), "backward": ("both", "first", "second")}
KERNELS = [(name, passes) for name, of_it in PASSES.items() for passes in of_it]
ARCHITECTURES = (80, 90)
FP32 = {"power", "shift", "sums", "norm", "dnorm", "dsums", "dpower", "dmap", "q_map", "k_map", "taps", "dtaps",
        "logit", "bias", "total", "dlogit", "dbias", "along", "about", "pooled", "keys", "values", "shifts", "parts",
        "dtotal", "dabout", "dpooled", "dkeys", "dvalues", "dshifts", "dparts"}  # fmt: skip
INTEGERS = {"rows", "columns", "height", "width", "prefix", "strips", "units", "per"}
OPTIONS = {"num_warps", "num_stages"}


def compile_ahead(
    name: str, passes: str, kind: str, head_dim: int, capability: int, dtype: str = "bf16"
) -> dict[str, Any]:
    """Registers per thread, bytes of spills and of shared memory of a kernel, compiled for `capability`."""
    kernel = getattr(triton_attention, f"{name}_kernel")
    kind, _, power = kind.partition("-")
    floats = torch.bfloat16 if dtype == "bf16" else torch.float32
    how = kernels.constants(kind, int(power or 0), head_dim, floats, name == "backward", passes.upper())
    constants = {"MAP": getattr(triton_attention, kind), "POWER": int(power or 0), "K": head_dim}
    constants |= {"PASSES": getattr(triton_attention, passes.upper())}
    constants |= {"SHARES": 1, "PARTS": 1} if passes == "both" else {}
    taken = {"FOCUSED": {"power"} - ({"power"} if power else set()), "EXP": {"shift"}, "HEDGEHOG": {"q_map", "k_map"}}
    constants |= dict.fromkeys({"power", "shift", "q_map", "k_map"} - taken.get(kind, set()))
    return measured(kernel, how | constants, head_dim, capability, dtype)


def convolution_ahead(name: str, size: int, head_dim: int, capability: int) -> dict[str, Any]:
    """As `compile_ahead`, of the convolution in bf16 over 16 heads."""
    how, _, _ = convolution.constants(size * size, 16 * head_dim, rows=16)
    how |= {"K": head_dim, "D": 16 * head_dim}
    how |= {"BASE": triton_convolution.OTHER, "TURNED": False, "parts": 1} if name == "convolution" else {}
    return measured(getattr(triton_convolution, f"{name}_kernel"), how, head_dim, capability)


def neighborhood_ahead(name: str, size: int, less: bool, head_dim: int, capability: int) -> dict[str, Any]:
    """As `compile_ahead`, of neighborhood attention in bf16; with `less`, as `pooled` takes it with larger cells."""
    how = neighborhood.constants(head_dim, size, 2 * less)
    return measured(getattr(triton_neighborhood, f"{name}_kernel"), how, head_dim, capability)


def pooled_kernels(cells: int, head_dim: int) -> list[tuple[str, str]]:
    """The kernels of `pooled` in bf16, and their passes."""
    _, blocks = pooled.far_constants(head_dim, cells**2 + 1, torch.bfloat16, backward=True)
    passes = ["both"] if blocks == 1 else ["queries", "keys"]
    return [*((name, "all") for name in ("pool", "pool_backward", "far")), *(("far_backward", x) for x in passes)]


def pooled_ahead(name: str, passes: str, cells: int, head_dim: int, capability: int) -> dict[str, Any]:
    """As `compile_ahead`, of `pooled` in bf16 over a grid of 32 x 32 and one prefix token."""
    backward = name.endswith("backward")
    if name.startswith("pool"):
        how = pooled.pool_constants(head_dim, cells, (-(-32 // cells)) ** 2)
    else:
        how, blocks = pooled.far_constants(head_dim, cells**2 + 1, torch.bfloat16, backward)
        how |= {"QUERIES": passes != "keys", "KEYS": passes != "queries"} if backward else {"ONE": blocks == 1}
    return measured(getattr(triton_pooled, f"{name}_kernel"), how | {"K": head_dim}, head_dim, capability)


def measured(kernel: Any, how: dict[str, Any], head_dim: int, capability: int, dtype: str = "bf16") -> dict[str, Any]:
    """Registers per thread, bytes of spills and of shared memory of a kernel.

    Args:
        how: its constants, and `OPTIONS` of the compiler.
        dtype: of tensors that are not of `FP32`.
    """
    constants = {key: value for key, value in how.items() if key not in OPTIONS}
    signature, attributes = {}, {}
    for i, key in enumerate(kernel.arg_names):
        stride = key[-1] in "BHN" and key[:-1].islower()
        if key in constants:
            signature[key] = "constexpr"
        elif key == "scale":
            signature[key] = "fp32"
        elif stride or key.isupper() or key in INTEGERS:
            signature[key] = "i32"
        else:
            signature[key] = f"*{'fp32' if key in FP32 else dtype}"
        if stride:
            attributes[i,] = [["tt.divisibility", 16 if head_dim % 16 == 0 else 8]]
        elif signature[key].startswith("*"):
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {key: how[key] for key in OPTIONS & set(how)}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(built.asm["ptx"])
        target = re.search(r"\.target (\w+)", built.asm["ptx"])[1]
        said = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name={target}", str(ptx), "-o", f"{folder}/out"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spills": spills,
        "shared": built.metadata.shared,
    }


def main() -> None:
    """Print the table."""
    kinds = [*dict.fromkeys(kernels.MAPS.values()), "FOCUSED-6"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head_dims", type=int, nargs="+", default=(32, 64, 72, 80, 88, 96, 128))
    parser.add_argument("--maps", nargs="*", choices=kinds, default=kinds, help="of attention")
    parser.add_argument("--sizes", type=int, nargs="*", default=(3, 5), help="of the convolution")
    parser.add_argument(
        "--windows", type=int, nargs="*", default=(3, 5), help="of neighborhood attention, alone and in `pooled`"
    )
    parser.add_argument("--cells", type=int, nargs="*", default=(2, 8, 32), help="of a side, of `pooled`")
    parser.add_argument("--for", dest="capabilities", type=int, nargs="+", default=ARCHITECTURES, metavar="SM")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    args = parser.parse_args()
    found = {
        (name, passes, kind, head_dim, capability): compile_ahead(name, passes, kind, head_dim, capability)
        for capability in args.capabilities
        for head_dim in args.head_dims
        for kind in args.maps
        for name, passes in KERNELS
    }
    found |= {
        (name, "all", f"{size}x{size}", head_dim, capability): convolution_ahead(name, size, head_dim, capability)
        for capability in args.capabilities
        for head_dim in args.head_dims
        for size in args.sizes
        for name in ("convolution", "taps")
    }
    found |= {
        (name, "all", f"{kind} {size}", head_dim, capability): neighborhood_ahead(
            name, size, less, head_dim, capability
        )
        for capability in args.capabilities
        for head_dim in args.head_dims
        for size in args.windows
        for kind, less in (("window", False), ("pooled", True))
        for name in ("forward", "by_queries", "by_keys")
    }
    found |= {
        (name, passes, f"cells {cells}", head_dim, capability): pooled_ahead(name, passes, cells, head_dim, capability)
        for capability in args.capabilities
        for head_dim in args.head_dims
        for cells in args.cells
        for name, passes in pooled_kernels(cells, head_dim)
    }
    if args.json:
        print(json.dumps({"-".join(map(str, key)): values for key, values in found.items()}))
        return
    rows = [[name, passes, kind.lower(), str(K), f"sm_{sm}", *map(str, values.values())]
            for (name, passes, kind, K, sm), values in found.items()]  # fmt: skip
    print(markdown(["kernel", "passes", "map", "head dim", "for", "registers", "bytes spilled", "bytes shared"], rows))


if __name__ == "__main__":
    main()
