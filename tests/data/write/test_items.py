"""Items: labels, keys and masks are what was asked for, or the item is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from data import IGNORE, inspect
from data.write import write
from data.write.items import Items, StructureError, to_label
from tests.support.pictures import picture

HOW = {"workers": 1, "progress": False}


@pytest.mark.parametrize(
    "value",
    [3, np.int8(3), np.uint64(3), np.array(3), np.array([3]), torch.tensor(3), torch.tensor([3]), 3.0, np.float32(3)],
)
def test_whole_numbers_are_labels(value):
    label = to_label(value)
    assert label == 3 and type(label) is int


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.7, "label 0.7 is not a whole number"),
        (np.float32(0.5), "label 0.5 is not a whole number"),
        (float("nan"), "label nan is not"),
        (torch.tensor(float("inf")), "label inf is not"),
        (True, "label True is not"),
        (np.bool_(False), "label False is not"),
        (None, "label None is not"),
        ("cat", "label 'cat' is not a whole number; give its number"),
        (b"3", "label b'3' is not"),
        ({"cat": 1}, "label a dict is not"),
        (1 + 2j, "is not a whole number"),
        (np.datetime64("2020-01-01"), "is not a whole number"),
        (-1, "label -1 is below 0"),
        (2**63, "label 9223372036854775808 is above"),
        (np.uint64(2**63), "is above"),
        (2**70, "is above"),
        ([0, 1, 0], "label has 3 values"),
        (np.eye(4)[0], "label has 4 values"),
        ([], "label has 0 values"),
    ],
)
def test_other_labels_are_refused(value, said):
    with pytest.raises(ValueError, match=said):
        to_label(value)


def test_a_bad_label_names_its_item(tmp_path):
    items = [(picture(0), 0), (picture(1), 0.7), (picture(2), 2)]
    with pytest.raises(ValueError, match=r"1 of 3 images unreadable, the first is item 1 \(ValueError: label 0\.7"):
        write(items, tmp_path / "x.beton", **HOW)
    assert write(items, tmp_path / "x.beton", skip_unreadable=True, **HOW)["skipped"][0]["name"] == "item 1"


KEYED = [{"img": picture(i), "fine_label": i, "coarse_label": 0} for i in range(3)]


@pytest.mark.parametrize(
    ("items", "how", "said"),
    [
        (KEYED, {}, "image_key 'image': item 0 has only 'img', 'fine_label', 'coarse_label'"),
        (KEYED, {"image_key": "imgs"}, "did you mean 'img'"),
        (
            KEYED,
            {"image_key": "img", "label_key": "fine_lable"},
            "label_key 'fine_lable': .* mean 'fine_label'",
        ),
        (KEYED, {"image_key": "img", "mask_key": "mask"}, "mask_key 'mask'"),
        ([KEYED[0], {"img": picture(1)}], {"image_key": "img", "label_key": "fine_label"}, "item 1 has only 'img'"),
        ([{"image": picture(0), "label": 0}, {"image": picture(1)}], {}, "item 1 has image, while .* image, label"),
        ([{"image": picture(0)}, {"image": picture(1), "label": 0}], {}, "item 1 has image, label, while .* image;"),
        ([(picture(0), 0)], {"label_key": "label"}, "label_key 'label': item 0 is a tuple without keys"),
        ([(picture(0), 0, 1)], {}, r"item 0 is \(Image, int, int\)"),
        ([(picture(0), 0)], {"mask_classes": ["a"]}, "classes of masks are given, but the items have no mask"),
        ([picture(0)], {"classes": ["a"]}, "classes of labels are given, but the items have no label"),
        ([(picture(0), 2)], {"classes": ["a", "b"]}, "has 2 names, but there is label 2"),
        ([(picture(0), 0)], {"classes": ["train", "val"]}, "are the splits train and val"),
    ],
)
def test_what_was_asked_for_is_there(tmp_path, items, how, said):
    """Also where unreadable items are left out: none of these is one."""
    with pytest.raises(ValueError, match=said):
        write(items, tmp_path / "x.beton", skip_unreadable=True, **HOW, **how)
    assert not list(tmp_path.iterdir())


def test_keys_that_are_not_used_are_told(tmp_path, capsys):
    side = write(KEYED, tmp_path / "x.beton", image_key="img", label_key="fine_label", workers=1)
    assert side["unused"] == ["coarse_label"] and inspect(tmp_path / "x.beton").max_label == 2
    assert "not used of the items: coarse_label" in capsys.readouterr().err


def test_masks_beside_images():
    """As torchvision's datasets give them: (image, mask), (image, (label, mask)); as images with a palette too."""
    image, values = Image.new("RGB", (6, 4)), (np.arange(24) % 3).astype(np.uint8).reshape(4, 6)
    coded = Image.fromarray(values, "P")
    coded.putpalette(range(9))
    for mask in (values, torch.from_numpy(values), Image.fromarray(values), coded):
        for item in (
            (image, mask),
            [image, mask],
            (image, (5, mask)),
            (image, 5, mask),
            {"image": image, "mask": mask},
        ):
            sample = Items([item], None, None, None, 3)[0]
            assert np.array_equal(sample["mask"], values) and sample.get("label", 5) == 5
            assert ("label" in sample) == any(isinstance(part, tuple | int) for part in item)
    border = np.where(values == 2, IGNORE, values)
    assert np.array_equal(Items([(image, border)], None, None, None, 2)[0]["mask"], border)
    for mask, said in (
        (Image.new("RGB", (6, 4)), "its mask is of colours"),
        (coded.resize((4, 4)), r"is uint8 \[4, 4\]"),
    ):
        with pytest.raises(ValueError, match=said):
            Items([(image, mask)], None, None, None, 3)[0]
    with pytest.raises(StructureError, match="item 0 is"):
        Items([(image, values, values)], None, None, None, 3)[0]


def test_a_mask_turns_with_its_image():
    stored = (np.arange(24) % 3).astype(np.uint8).reshape(4, 6)
    image = Image.fromarray(stored.repeat(3).reshape(4, 6, 3))
    for orientation in range(1, 9):
        image.getexif()[0x112] = orientation
        sample = Items([(image, stored)], None, None, None, 3)[0]
        assert np.array_equal(sample["image"][..., 0], sample["mask"])
