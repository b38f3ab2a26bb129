"""Linear probes on every module of every block, teacher beside student."""

from trainer.probe.quick import QuickProbe
from trainer.probe.stage import run

__all__ = ["QuickProbe", "run"]
