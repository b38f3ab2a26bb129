"""Linear attention operators, and what may be added to them. A new one is a class here and a line in its table."""

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from .additions import Gate, LocalConvolution, LocalDynamic, Temperature, ValueConvolution
from .core import Operator, Shape, linear_attention
from .feature_maps import Elu1, Exp, Focused, FocusedLearned, Hedgehog, ReLU
from .grid import PatchGrid
from .magnitude import MALA, InLine
from .mhla import MHLA
from .neighborhood import Neighborhood
from .polaformer import PolaFormer
from .pooled import Pooled
from .rala import RALA

OPERATORS: dict[str, type[Operator]] = {
    "elu1": Elu1,
    "relu": ReLU,
    "focused": Focused,
    "focused_learned": FocusedLearned,
    "hedgehog": Hedgehog,
    "exp": Exp,
    "mala": MALA,
    "inline": InLine,
    "mhla": MHLA,
    "rala": RALA,
    "polaformer": PolaFormer,
    "pooled": Pooled,
}

ADDITIONS: dict[str, Any] = {
    "value_conv3": partial(ValueConvolution, size=3),
    "value_conv5": partial(ValueConvolution, size=5),
    "neighborhood3": partial(Neighborhood, size=3),
    "neighborhood5": partial(Neighborhood, size=5),
    "local_conv3": partial(LocalConvolution, size=3),
    "local_conv5": partial(LocalConvolution, size=5),
    "local_dynamic": LocalDynamic,
    "gate": Gate,
    "temperature": Temperature,
}


def build_operator(name: str, shape: Shape, kwargs: Mapping[str, Any] | None = None) -> Operator:
    """The operator called `name`.

    Raises:
        ValueError: no operator has that name, or it takes no such keyword or value.
    """
    check_operator(name, kwargs)
    try:
        return OPERATORS[name](shape, **(kwargs or {}))
    except ValueError as error:
        raise ValueError(f"operator {name!r}: {error}") from error


def build_additions(names: Iterable[str], shape: Shape) -> dict[str, nn.Module]:
    """Name to addition, in the order of the table, by which they act whatever the order of `names`."""
    check_additions(names)
    return {name: ADDITIONS[name](shape) for name in ADDITIONS if name in names}


def check_operator(name: str, kwargs: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError when no operator is called `name`, or it does not take one of `kwargs`."""
    if name not in OPERATORS:
        raise ValueError(f"operator {name!r}: unknown; choose one of {', '.join(OPERATORS)}")
    takes = [key for key in inspect.signature(OPERATORS[name]).parameters if key != "shape"]
    for key in kwargs or {}:
        if key not in takes:
            raise ValueError(f"operator {name!r}: takes no {key!r}, but {', '.join(takes) or 'no keywords at all'}")


def check_additions(names: Iterable[str]) -> None:
    """Raises ValueError when one of `names` is no addition."""
    for name in names:
        if name not in ADDITIONS:
            raise ValueError(f"addition {name!r}: unknown; choose among {', '.join(ADDITIONS)}")
