"""Pictures for the page: charts as SVG whose colours follow the page's theme, and images as they are."""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from trainer.output import charts

# The charts' colours -> the page's variables.
THEME = {
    charts.INK: "ink", charts.MUTED: "muted", charts.GRID: "line", charts.TEACHER: "teacher",
    **{colour: f"series{i}" for i, colour in enumerate(charts.SERIES)},
}  # fmt: skip
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def chart(label: str, *draws: charts.Draw, width: float = 1.0) -> Markup:
    """An inline SVG of `charts.figure`; `label` says to a screen reader what it shows."""
    from matplotlib import rc_context

    text = io.StringIO()
    # Two charts on one page must not share names.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        charts.figure(*draws, width=width).savefig(text, format="svg", metadata=NO_METADATA, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font(-family)?: ([\d.]*px )?'DejaVu Sans'[^;\"]*;?", _font, svg)
    for colour, name in THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    wide = f"--width: {width:.2f}"
    return Markup('<div class="chart" style="{}" aria-label="{}">{}</div>').format(wide, label, Markup(svg))


def _font(found: re.Match[str]) -> str:
    return f"font-size: {found[2].strip()};" if found[2] else ""


def png(path: Path) -> str:
    """An image file as a `data:` address."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def tiles(path: Path, boxes: Sequence[Sequence[int]]) -> list[str]:
    """Parts of an image, (left, top, right, bottom) each, as `data:` addresses."""
    from PIL import Image

    found = []
    with Image.open(path) as image:
        for box in boxes:
            file = io.BytesIO()
            image.crop(tuple(box)).convert("RGB").save(file, "WEBP", quality=90)
            found.append(f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}")
    return found
