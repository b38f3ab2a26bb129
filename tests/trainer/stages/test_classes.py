"""Classes of two data sets: equal names in equal order, or one line that names the first difference."""

from dataclasses import replace
from pathlib import Path

import pytest

import data
from trainer.config import UserError
from trainer.stages.classes import check_same_classes


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"classes": ["b", "a", "c", "d"]}, "class 0 is 'b', there 'a'"),
        ({"classes": ["a", "b", "c"], "max_label": 2}, "class 3 is missing, there 'd'"),
        ({"classes": ["a", "b", "c", "d", "e"]}, "class 4 is 'e', there missing"),
        ({"classes": None, "max_label": 4}, "labels up to 4, outside the 4 classes"),
        ({"mask_classes": ["red", "noise"]}, "class 0 is 'red', there 'noise'"),
    ],
)
def test_other_classes_are_refused(changed: dict, words: str, small: Path) -> None:
    train = replace(data.inspect(small / "train.beton"), mask_classes=["noise", "red"])
    for same in (train, replace(train, classes=None, mask_classes=None), replace(train, has_labels=False)):
        check_same_classes(train, same, "data.val")
    with pytest.raises(UserError, match=words) as caught:
        check_same_classes(train, replace(train, **changed), "data.val")
    assert str(caught.value).startswith("data.val ")
