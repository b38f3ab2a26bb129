"""What the two alignment stages ask of the settings."""

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
