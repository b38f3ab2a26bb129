"""Images -> a .beton file: `python -m data.write SOURCE OUT.beton`, or `write(dataset, out)` for a dataset object.

`command` is the command line, `dataset` the whole of one writing, `items` a dataset's items as checked samples, `pages`
the processes that write them, `open_files` what these do with files that were open before, `side` the JSON beside.
"""

from data.write.command import main
from data.write.dataset import write

__all__ = ["main", "write"]
