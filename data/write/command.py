"""The command line: `python -m data.write SOURCE OUT.beton`."""

import argparse
import errno
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from data import corrupt, segmentation
from data.layouts import LAYOUTS, Arrays, open_source
from data.sources import ImageFolder, in_words
from data.write import side
from data.write.dataset import write


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(message))


def _fail(message: object) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def _raw_share(text: str) -> float | str:
    return text if text == "smart" else float(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _Parser(prog="python -m data.write", description="Write a folder of images as a .beton file.")
    parser.add_argument(
        "source",
        help="a folder: one subfolder per class, any folder of unlabelled images, or an unpacked data set",
    )
    parser.add_argument("out", help="the file to write, such as train.beton")
    parser.add_argument("--max_side", type=int, help="shrink larger images to this longer side, pixels")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1..100 (default 90)")
    parser.add_argument(
        "--raw_share", type=_raw_share, default="smart", help='share kept raw, 0..1, or "smart" (default)'
    )
    parser.add_argument("--smart_threshold", type=int, default=100_000, help="raw bytes from which smart takes JPEG")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--unlabelled", action="store_true", help="take no labels from subfolders")
    parser.add_argument(
        "--task", choices=["classification", "segmentation"], default="classification",
        help="segmentation writes a mask with each image (default classification)",
    )  # fmt: skip
    parser.add_argument("--masks", metavar="FOLDER", help="of any folder of images: its masks, of the same names")
    parser.add_argument(
        "--classes", metavar="CSV", help="what the masks' values mean, lines of value,name (default: the layout's own)"
    )
    parser.add_argument("--allow_empty", action="store_true", help="let a class of a training split have no pixel")
    parser.add_argument("--skip_unreadable", action="store_true", help="leave out unreadable images instead of failing")
    parser.add_argument(
        "--layout",
        choices=["folder", *LAYOUTS, *segmentation.LAYOUTS],
        help="how the source is laid out (default: found out)",
    )
    parser.add_argument("--split", choices=["train", "val", "test"], help="of a data set (default: its first)")
    parser.add_argument("--corrupt", metavar="NAME", help=f"write a shifted copy: {', '.join(corrupt.CORRUPTIONS)}")
    parser.add_argument("--severity", type=int, choices=corrupt.SEVERITIES, help="of the corruption")
    parser.add_argument("--seed", type=int, default=0, help="of the corruption's noise (default 0)")
    options = vars(parser.parse_args(arguments))
    source, out, layout, split = (options.pop(name) for name in ("source", "out", "layout", "split"))
    unlabelled, name, severity = (options.pop(name) for name in ("unlabelled", "corrupt", "severity"))
    task, masks, classes = (options.pop(name) for name in ("task", "masks", "classes"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the unfinished file is removed
    try:
        if (name is None) != (severity is None):
            raise ValueError("corrupt, severity: give both, such as --corrupt contrast --severity 3")
        corruption = None if name is None else (name, severity)
        if task == "segmentation":
            if unlabelled:
                raise ValueError("unlabelled: is for classification; leave it out")
            folder = segmentation.open_pairs(source, layout, split, masks, classes)
            options["allow_empty"] |= split in ("val", "test")  # what is small may lack a rare class
        elif masks or classes:
            raise ValueError("masks, classes: belong to --task segmentation")
        else:
            folder = open_source(source, layout, split, corruption, unlabelled)
        print(f"{source}: {len(folder)} images, {folder.why}{in_words(getattr(folder, 'passed_over', ()))}")
        if isinstance(folder, Arrays) and folder.corrupted:
            corruption = None
        if not isinstance(folder, ImageFolder):
            source = f"{source} ({folder.why})"
        content = write(folder, out, source=source, corruption=corruption, **options)
    except OSError as error:
        return _fail(error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT) else error)
    except (ValueError, RuntimeError) as error:
        return _fail(error)
    print(f"{out}: {content['count']} images, {content['bytes'] / 1e6:.1f} MB")
    if "pixels" in content:
        print(side.summary(content))
    return 0
