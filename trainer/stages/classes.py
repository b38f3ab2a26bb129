"""Whether two data sets have the same classes: the same names in the same order, so that a label means one thing."""

import data
from trainer.config import UserError


def check_same_classes(train: data.Info, other: data.Info, setting: str) -> None:
    """Compare the classes of images that a model is evaluated on with those that it is trained on.

    The names and their order are compared where both files have them, of labels and of masks. Labels must lie within
    the training classes.

    Args:
        setting: what names the other file, such as "data.val".

    Raises:
        UserError: one line that names the first class that differs.
    """
    for kind in ("classes", "mask_classes"):
        ours, theirs = getattr(train, kind), getattr(other, kind)
        if ours and theirs and ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            at = min(len(ours), len(theirs)) if at is None else at
            is_now, there = (repr(names[at]) if at < len(names) else "missing" for names in (theirs, ours))
            raise UserError(
                f"{setting} {other.path}: has other classes than data.train: class {at} is {is_now}, there {there}; "
                "write it again with the classes of data.train, in their order"
            )
    if train.has_labels and other.has_labels and other.max_label >= num_classes(train):
        raise UserError(
            f"{setting} {other.path}: has labels up to {other.max_label}, outside the {num_classes(train)} classes "
            "of data.train"
        )


def num_classes(train: data.Info) -> int:
    """Classes of a file with labels: as many as it names, else one more than its largest label."""
    return len(train.classes) if train.classes else train.max_label + 1
