"""Short scripts that use what is here; `tools/write_notebook.py` makes the notebook of them."""
