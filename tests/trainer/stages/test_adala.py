"""The recipe `adala` is the paper's, by what it says itself: no default of a setting can change it."""

import pytest

from trainer.config import RECIPES, parse, read_yaml

PAPER = {
    "student": {"operator": "elu1", "operator_kwargs": {}, "additions": [], "keep_softmax": []},
    "stage1": {"match": "output"},
    "stage2": {"loss": "mse", "prefix_weight": 1, "standardise": False, "blocks": [], "attention_weight": 0},
    "stage3": {"distill": None, "attention_weight": 0},
}
TRAIN = {"1": (1, 5e-3), "2": (1.5, 1e-3), "3": (1, 5e-4)}  # epochs, learning rate


@pytest.mark.parametrize("stage", TRAIN)
def test_the_papers_student_and_losses(stage: str) -> None:
    settings = parse(["--stage", stage, "--config", "adala"])
    for group, values in PAPER.items():
        assert {name: getattr(getattr(settings, group), name) for name in values} == values
    assert (settings.train.epochs, settings.train.lr) == TRAIN[stage]
    said = read_yaml(RECIPES / "adala.yaml")
    assert {group: said[group] for group in PAPER} == PAPER
