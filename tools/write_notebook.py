"""Writes examples/examples.ipynb from the scripts beside it: `python -m tools.write_notebook`."""

import ast
import re
import shlex
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("convert", "pipeline", "segmentation")
START = """# Examples

Made from the scripts beside it by `python -m tools.write_notebook`. Start it in a clone, with the environment that
`make setup` builds. Change the arguments in `parse_args`."""


def cells(script: Path) -> list[nbformat.NotebookNode]:
    """A script as a cell of words, its docstring, and a cell of code with the arguments that the docstring names."""
    source = script.read_text()
    said = ast.get_docstring(ast.parse(source))
    words, _, command = said.partition("\n\n")
    arguments = shlex.split(command.strip())[3:]
    code = source.split('"""\n\n', 1)[1]
    code, count = re.subn(r"parse_args\(\)", f"parse_args({arguments!r})", code)
    assert count == 1, script
    return [new_markdown_cell(words), new_code_cell(code.strip())]


def notebook() -> str:
    """The text of the notebook; the same for the same scripts."""
    where = new_code_cell('import os\n\nif os.path.basename(os.getcwd()) == "examples":\n    os.chdir("..")')
    found = [new_markdown_cell(START), where, *(cell for name in SCRIPTS for cell in cells(EXAMPLES / f"{name}.py"))]
    for number, cell in enumerate(found):
        cell.id = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = new_notebook(cells=found, metadata={"kernelspec": kernel})
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


if __name__ == "__main__":
    (EXAMPLES / "examples.ipynb").write_text(notebook())
