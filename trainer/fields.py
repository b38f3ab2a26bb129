"""The types of settings: a plain type and the values that it may have, as pydantic checks them; and both in words."""

import os.path
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, AllowInfNan, BeforeValidator


@dataclass(frozen=True)
class Must:
    """A condition on a value, for `pydantic.AfterValidator`; `words` complete the sentence "must be ..."."""

    words: str
    holds: Callable[[Any], bool]

    def __call__(self, value: Any) -> Any:
        if not self.holds(value):
            raise ValueError(f"must be {self.words}")
        return value


def checked(kind: Any, words: str, holds: Callable[[Any], bool]) -> Any:
    """The type `kind`, of which a value must hold; `words` complete the sentence "must be ..."."""
    return Annotated[kind, AfterValidator(Must(words, holds))]


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would take it as 1 or 0
        raise ValueError("must be a number")
    return value


_Float = Annotated[float, BeforeValidator(_no_bool), AllowInfNan(False)]
_Int = Annotated[int, BeforeValidator(_no_bool)]

Positive = Annotated[_Float, Gt(0)]
NonNegative = Annotated[_Float, Ge(0)]
Probability = Annotated[_Float, Ge(0), Le(1)]
Fraction = Annotated[_Float, Gt(0), Le(1)]
OpenFraction = Annotated[_Float, Gt(0), Lt(1)]
BelowOne = Annotated[_Float, Ge(0), Lt(1)]
Count = Annotated[_Int, Ge(1)]
CountOrZero = Annotated[_Int, Ge(0)]
PathName = Annotated[str, AfterValidator(os.path.expanduser)]
OptionalPath = Annotated[str, AfterValidator(lambda v: None if v.lower() == "none" else os.path.expanduser(v))] | None
Factors = checked(list[float], "a list of numbers above 0", lambda v: v and min(v) > 0)
Interval = checked(list[float], "two values, 0 < least <= most", lambda v: len(v) == 2 and 0 < v[0] <= v[1])
Shares = checked(list[float], "two values, 0 < least <= most <= 1", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1)

Auto = checked(str, "auto:K for K blocks", lambda v: re.fullmatch(r"auto:[1-9]\d*", v))


def count_of(auto: str) -> int:
    """K of auto:K."""
    return int(auto.removeprefix("auto:"))


def non_empty(kind: Any) -> Any:
    """A list of at least one."""
    return checked(list[kind], f"a list of at least one ({words(kind)})", len)


def _at_home(pairs: list[str]) -> list[str]:
    return [f"{name}={os.path.expanduser(path)}" for name, _, path in (pair.partition("=") for pair in pairs)]


_Pairs = checked(list[str], "NAME=FILE ...", lambda v: all(re.fullmatch(r"[\w.+-]+=.+", pair) for pair in v))
Named = Annotated[_Pairs, AfterValidator(_at_home)]

_PLAIN = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}


def words(kind: Any) -> str:
    """What a value of the type `kind` must be: "a whole number, at least 1, or null"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        parts = [words(arg) for arg in args]
        return f"{', '.join(parts[:-1])}{',' if ',' in parts[0] else ''} or {parts[-1]}"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if hasattr(kind, "__metadata__"):
        base, *found = words(kind.__origin__), *(_limit(part) for part in kind.__metadata__)
        own = [part.func.words for part in kind.__metadata__ if isinstance(getattr(part, "func", None), Must)]
        limits = " and ".join(part for part in found if part)
        return own[-1] if own else f"{base} {limits}" if limits else base
    if origin is list:
        return f"a list ({words(args[0])} each)"
    if origin is dict:
        return "a mapping"
    return _PLAIN.get(kind, getattr(kind, "__name__", str(kind)))


def _limit(part: Any) -> str:
    signs = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return next((f"{sign} {getattr(part, name):g}" for name, sign in signs.items() if hasattr(part, name)), "")
