"""Images -> .beton files -> batches. Knows nothing of models or of training.

Writing is `python -m data.write`, or `from data.write import write`.
"""

from data import _ffcv  # before all that import FFCV
from data.augment import balanced, lots
from data.beton import DamagedError, Info, inspect
from data.decode import IGNORE
from data.loader import Loader, eval_loader, original_loader, train_loader
from data.order import choose_order, epoch_order, windowed_order
from data.resolve import resolve

__all__ = [
    "IGNORE",
    "DamagedError",
    "Info",
    "Loader",
    "balanced",
    "choose_order",
    "epoch_order",
    "eval_loader",
    "inspect",
    "lots",
    "original_loader",
    "resolve",
    "train_loader",
    "windowed_order",
]
