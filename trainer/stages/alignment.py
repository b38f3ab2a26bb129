"""What alignment asks of the settings."""

from typing import Any


def check_alignment(settings: Any) -> None:
    """Raises ValueError when there is nothing to align, or nothing that the loss reaches is trained."""
    if settings.student.attention == "softmax":
        raise ValueError(
            "student.attention softmax: is the baseline of stage 3, there is nothing to align in stage 1 or 2"
        )
    if settings.student.trainable == "head":
        raise ValueError(
            "student.trainable head: no loss of stage 1 or 2 reaches the head; choose qkv, attention or backbone"
        )


def check_kept_on(settings: Any, stage: str, weight: float) -> None:
    """Raises ValueError when `stage` cannot keep stage 1's loss on with this `attention_weight`."""
    if not weight:
        return
    given = f"{stage}.attention_weight {weight}"
    if settings.student.attention == "softmax":
        raise ValueError(f"{given}: student.attention softmax leaves nothing to align")
    if settings.student.trainable == "head":
        raise ValueError(f"{given}: does not reach what student.trainable head trains; choose another")
    if settings.train.compile:
        raise ValueError(f"{given}: is read inside of what train.compile compiles; use one of the two")
