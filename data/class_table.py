"""What the values in masks' files mean: a class table, and the colours that classes are drawn in.

A table is a CSV of lines `value,name,red,green,blue`, with or without that line as its head. A line's class is the next
one, in the table's order from 0 on. A line without a name is ignored, and so is 255 where no line has it. The colours
are for pictures; a table may go without. Tables of known data sets lie in `data/classes/`.
"""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.decode import IGNORE
from data.paths import did_you_mean, expand

TABLES = Path(__file__).parent / "classes"
_NUMBER = re.compile(r"\s*[0-9]+\s*")  # int() takes more, such as 1_0


@dataclass(frozen=True)
class ClassTable:
    """What the values in masks mean.

    Attributes:
        names: of the classes.
        palette: (R, G, B) of each class, in 0..255.
        classes: int16 [65536], the class of each value in a file; `IGNORE`, or -1 where the table does not have it.
    """

    names: list[str]
    palette: list[list[int]]
    classes: np.ndarray

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Values as in a file, integers [H, W] -> classes, uint8 [H, W].

        Raises:
            ValueError: a value is not in the table.
        """
        inside = (labels >= 0) & (labels < len(self.classes))
        classes = self.classes[labels if inside.all() else np.where(inside, labels, 0)]
        unknown = ~inside | (classes < 0)
        if unknown.any():
            values = np.unique(labels[unknown])
            shown = ", ".join(map(str, values[:5])) + (" and others" if len(values) > 5 else "")
            raise ValueError(f"has label {shown}, which is not in the class table")
        return classes.astype(np.uint8)


def read_table(path: str | Path) -> ClassTable:
    """A class table from a CSV, see the module.

    As spreadsheets save it, it may begin with a byte order mark, and have semicolons or tabs for commas.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such table, has a value or a name twice, or more than 255 classes.
    """
    path = expand(path)
    if not path.is_file():
        want = "give a CSV of lines value,name,red,green,blue"
        raise FileNotFoundError(f"{path}: no such class table{did_you_mean(path)}; {want}")
    names, colours, classes = [], [], np.full(1 << 16, -1, np.int16)
    for number, row in enumerate(_rows(path), 1):
        if not any(map(str.strip, row)) or (number == 1 and row[0].strip().lower() == "value"):
            continue
        try:
            value, name, colour = _int(row[0]), row[1].strip(), [_int(part) for part in row[2:] if part.strip()]
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: line {number} is not value,name,red,green,blue") from error
        if not 0 <= value < len(classes) or len(colour) not in (0, 3) or not all(0 <= part <= 255 for part in colour):
            raise ValueError(f"{path}: line {number} has a value outside 0..65535, or no colour in 0..255")
        if classes[value] != -1 or (name and name in names):
            raise ValueError(f"{path}: line {number} has a value or a name that an earlier line has")
        classes[value] = len(names) if name else IGNORE
        if name:
            names.append(name)
            colours.append(colour)
    if not 0 < len(names) <= IGNORE:
        raise ValueError(f"{path}: has {len(names)} classes; a table must have 1 to {IGNORE}")
    if classes[IGNORE] == -1:
        classes[IGNORE] = IGNORE
    usual = default_palette(len(names))
    return ClassTable(names, [given or other for given, other in zip(colours, usual, strict=True)], classes)


def default_palette(count: int) -> list[list[int]]:
    """Pascal VOC's colours of `count` classes: a class number's bits, dealt to R, G and B from the highest on."""
    palette = []
    for number in range(count):
        bits = [[(number >> (3 * place + channel)) & 1 for place in range(8)] for channel in range(3)]
        palette.append([sum(bit << (7 - place) for place, bit in enumerate(channel)) for channel in bits])
    return palette


def _rows(path: Path) -> list[list[str]]:
    """The cells of a CSV. What comes first after a value, or after the head's `value`, parts the cells."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}: is saved as UTF-16; save it as CSV in UTF-8")
    try:
        text = content.decode("utf-8-sig")
        first = re.match(r'\s*"?(?:value|[0-9]+)"?\s*([,;\t])', text, re.IGNORECASE)
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=first[1] if first else ","))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read as a CSV; save it as CSV in UTF-8 ({error})") from error
    except csv.Error as error:
        raise ValueError(f"{path}: cannot be read as a CSV ({error})") from error


def _int(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError(text)
    return int(text)
