"""The program; from Python `convert`."""

from trainer.call import convert

__all__ = ["convert"]
