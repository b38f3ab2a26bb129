"""Charts of what a run measures: a stage writes them as PNG, the report as SVG. Colours are few and told by name."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes a second to import, which runs without a chart do without
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1b1f24", "#66707b", "#dde1e6", "#fefefe"
TEACHER, STUDENT, OTHER = "#8d96a0", "#1f6feb", "#d1652a"
SERIES = (STUDENT, OTHER, "#2a9d6f", "#9a5bd0", "#b8860b", "#c2407a", "#4f7f8c", "#6b6f2a")
STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titley": 1.0,
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID,
    "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "ytick.left": False, "legend.frameon": False, "legend.fontsize": 8.5,
    "legend.columnspacing": 1.2, "legend.handlelength": 1.2, "legend.labelspacing": 0.3,
    "axes.facecolor": PAPER, "figure.facecolor": PAPER, "axes.linewidth": 0.8, "text.parse_math": False,
}  # fmt: skip
SIZE = (4.1, 2.5)  # inches, of a chart

Curve = tuple[Sequence[float], Sequence[float | None]]
Draw = Callable[["Axes"], None]


def figure(*charts: Draw, width: float = 1.0) -> "Figure":
    """Charts side by side, each `width` times as wide as usual."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        whole = Figure(figsize=(SIZE[0] * width * len(charts), SIZE[1]))
        axes, legend = whole.subplots(1, len(charts), squeeze=False)[0], 0.0
        for axis, draw in zip(axes, charts, strict=True):
            draw(axis)
            names = axis.get_legend_handles_labels()[1]
            if names:  # between title and chart, where nothing is drawn
                columns = max(1, min(len(names), round(60 * width) // (4 + max(map(len, names)))))
                rows = -(-len(names) // columns)
                axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=columns)
                axis.set_title(axis.get_title(loc="left"), pad=7 + 13 * rows)
                legend = max(legend, 0.18 * rows)
        # Fixed margins in inches: to measure what is drawn takes longer than to draw it.
        wide, high = whole.get_size_inches()
        left, right, space = 0.66 / wide, 1 - 0.1 / wide, 0.85 / SIZE[0] / width
        whole.subplots_adjust(left, 0.46 / high, right, 1 - (0.32 + legend) / high, wspace=space)
    return whole


def save(path: Path, whole: "Figure") -> None:
    """Write a PNG; its folder is made. Raises OSError when it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.savefig(path, dpi=160)


def by_block(values: Mapping[str, Any], name: str) -> dict[int, float]:
    """Of a metrics line {"NAME.blocks.3": 0.1, ...} -> {3: 0.1, ...}."""
    start = f"{name}.blocks."
    return {int(k.removeprefix(start)): v for k, v in values.items() if k.startswith(start) and v is not None}


def curves(
    axis: "Axes", title: str, found: Mapping[str, Curve], log: bool = False, x: str = "step", zero: bool = True
) -> None:
    """A line per name: (x, values). Values that are None leave a gap; few values are dots too.

    Args:
        log: where the values differ much, on a logarithmic axis.
        zero: otherwise from 0 on.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    for i, (name, (at, values)) in enumerate(found.items()):
        y = _finite(values)
        dots = {"marker": "o", "markersize": 3.5} if len(y) < 12 else {}
        label = f" {name}" if len(found) > 1 else None  # a name that begins with _ would be left out
        colour = {"teacher": TEACHER, "student": STUDENT}.get(name, SERIES[i % len(SERIES)])
        axis.plot(at, y, color=colour, linewidth=1.5, label=label, **dots)
    positive = [v for _, values in found.values() for v in values if v is not None and v > 0]
    if log and positive and max(positive) > 5 * min(positive):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(positive) < 100 * min(positive) else (1,)))
        axis.yaxis.set_major_formatter("{x:g}")  # the usual one writes TeX
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif positive and zero:
        axis.set_ylim(bottom=0)
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.locator_params("x", nbins=5, integer=True)


def block_errors(axis: "Axes", found: Mapping[str, Mapping[int, float]]) -> None:
    """Errors of each block, a colour per name: block -> mean squared error."""
    blocks = sorted({block for values in found.values() for block in values})
    width = 0.8 / max(1, len(found))
    for i, (name, values) in enumerate(found.items()):
        at = [blocks.index(b) + (i - (len(found) - 1) / 2) * width for b in values]
        axis.bar(at, list(values.values()), 0.9 * width, color=SERIES[i % len(SERIES)], label=name)
    axis.set_title("Alignment error by block")
    axis.set_ylabel("mean squared error")
    _number(axis, blocks)


def entropy(axis: "Axes", found: Mapping[int, float]) -> None:
    """The entropy of the teacher's attention by block, block -> share of log N."""
    blocks = sorted(found)
    axis.plot(range(len(blocks)), [found[b] for b in blocks], color=STUDENT, marker="o", markersize=4, linewidth=1.5)
    axis.set_title("Entropy of the teacher's attention")
    axis.set_ylabel("share of log N")
    axis.set_ylim(0, 1.02)
    _number(axis, blocks)


def damage_alone(axis: "Axes", found: Mapping[str, Any]) -> None:
    """Of `blocks.json`: what the final tokens lose where one block alone is linear."""
    alone, softmax = _finite(found["alone"]), found["softmax"]
    for name, colour, stays in (("stays softmax", OTHER, True), ("becomes linear", STUDENT, False)):
        blocks = [i for i in range(len(alone)) if (i in softmax) == stays]
        axis.bar(blocks, [alone[i] for i in blocks], 0.7, color=colour, label=name)
    axis.set_title("One block alone is linear")
    axis.set_ylabel("1 - cosine of the final tokens")
    _number(axis, range(len(alone)))


def damage_in_order(axis: "Axes", found: Mapping[str, Any]) -> None:
    """Of `blocks.json`: what they lose as blocks become linear one after the other."""
    order = found["order"]
    axis.plot(range(len(order)), _finite([entry["damage"] for entry in order]), color=STUDENT, marker="o", markersize=4)
    axis.set_title("Blocks become linear one after the other")
    axis.set_ylabel("1 - cosine of the final tokens")
    axis.set_ylim(bottom=0)
    _number(axis, [entry["block"] for entry in order])
    axis.set_xlabel("block, in the order of the choice")


def width_of(blocks: int) -> float:
    """How wide a chart of so many blocks is, for `figure`."""
    return max(1.0, blocks / 14)


def _finite(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None or not math.isfinite(value) else value for value in values]


def _number(axis: "Axes", blocks: Sequence[int]) -> None:
    every = max(1, -(-len(blocks) // 24))
    axis.set_xticks(range(0, len(blocks), every), [str(b) for b in blocks[::every]])
    axis.set_xlabel("block")
