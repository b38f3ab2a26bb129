"""Training at other sizes first: short low, then high. The samples and their order stay what they are.

Models then take images of any size. Their position embeddings are those of the last size, resampled in each forward
pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

from trainer.fields import Count, checked

Size = int | list[int]  # pixels, a side or [height, width]


def plain(size: Sequence[int] | int) -> Size:
    """A side where height and width are the same, else [height, width]: as settings and exports hold it."""
    height, width = (size, size) if isinstance(size, int) else size
    return height if height == width else [height, width]


def pair(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else tuple(size)


def parse(spec: str) -> tuple[Size, float]:
    """`224:0.8` or `224x448:0.8` -> the size, (height, width) where they differ, and its share of the steps.

    Raises:
        ValueError: it is neither.
    """
    size, share = spec.split(":")
    height, width = map(int, size.split("x")) if "x" in size else (int(size), int(size))
    return plain((height, width)), float(share)


def _leave_steps(specs: list[str]) -> bool:
    try:
        found = [parse(spec) for spec in specs]
    except ValueError:
        return False
    return all(share > 0 and min(pair(size)) >= 1 for size, share in found) and sum(share for _, share in found) < 1


ImageSize = Count | checked(list[int], "[height, width]", lambda v: len(v) == 2 and min(v) >= 1)
Resolutions = checked(list[str], 'sizes with shares of the steps, below 1 in all, as in ["224:0.8"]', _leave_steps)


class Phase(NamedTuple):
    """Images of `size` up to the step `until`."""

    size: Size
    until: int


def phases(specs: list[str], last: Size, steps: int) -> list[Phase]:
    """The sizes of `data.resolutions`, each with the step that ends it; then `last`."""
    found, share = [], 0.0
    for size, part in map(parse, specs):
        share += part
        found.append(Phase(size, round(share * steps)))
    return [*found, Phase(last, steps)]


def in_words(found: list[Phase]) -> str:
    """`224 pixels to step 80, then 512`."""
    words = [" x ".join(map(str, dict.fromkeys(pair(phase.size)))) for phase in found]
    return ", then ".join(
        [f"{word} pixels to step {phase.until}" for word, phase in zip(words[:-1], found, strict=False)] + words[-1:]
    )


class PhasedLoader:
    """A training loader whose images change size at the steps that `phases` tell.

    Attributes:
        steps_per_epoch, accumulate: as a loader's.
    """

    def __init__(self, found: list[Phase], loader_of: Callable[[Size], Any], steps_per_epoch: int, accumulate: int):
        """`loader_of` builds the loader for a size, when its first batch is due."""
        self.phases, self.loader_of = found, loader_of
        self.steps_per_epoch, self.accumulate = steps_per_epoch, accumulate
        self.at: Phase | None = None
        self.loader: Any = None

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[dict[str, Any]]:
        """This rank's batches of an epoch from global batch `start` on, each of the size that its step has."""
        while start < self.steps_per_epoch:
            step = epoch * self.steps_per_epoch + start
            phase = next((phase for phase in self.phases if step < phase.until), self.phases[-1])
            left = self.steps_per_epoch - start
            count = left if phase is self.phases[-1] else min(left, phase.until - step)
            with closing(self._loader(phase).epoch(epoch, start)) as batches:
                yield from islice(batches, count * self.accumulate)
            start += count

    def close(self) -> None:
        """Ends the running epoch's threads, if any."""
        if self.loader is not None:
            self.loader.close()

    def _loader(self, phase: Phase) -> Any:
        if phase is not self.at:
            self.close()
            self.at, self.loader = phase, self.loader_of(phase.size)
        return self.loader
