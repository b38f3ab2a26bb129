"""Images -> .beton files -> batches. Knows nothing of models or of training.

Writing is `python -m data.write`, or `from data.write import write`.
"""

from data import _ffcv  # before all that import FFCV
from data.beton import Info, inspect
from data.loader import Loader, eval_loader, resolve, train_loader
from data.order import epoch_order

__all__ = ["Info", "Loader", "epoch_order", "eval_loader", "inspect", "resolve", "train_loader"]
