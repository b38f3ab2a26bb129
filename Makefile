# Everything done twice. Each target builds .venv first when it is missing or out of date (tools/setup.sh).
# ARGS goes on to the command: make test ARGS="-k wheel", make bench-stages ARGS="--help".

SHELL := /bin/bash
.DEFAULT_GOAL := help

# DeepSpeed finds ninja and its own launcher on the path, so .venv/bin goes first.
VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"
PYTHON_VENV := $(VENV) .venv/bin/python

.PHONY: help setup demo docs test faults cluster-test lint format lock bench bench-stages bench-saving bench-order \
	bench-probe bench-recipes bench-foundation bench-gpu bench-kernels bench-resolution bench-scaling bench-segmentation bench-step \
	bench-start bench-loader wheel clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Build .venv and install what is missing (every other target does it too)
	@tools/setup.sh

demo: setup  ## Convert the embedded ViT, by the recommended recipe and by the paper's: a table and a report (minutes)
	$(PYTHON_VENV) -m benchmarks.demo $(ARGS)

docs: setup  ## Build the documentation's site into site/, without a warning
	$(VENV) NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict $(ARGS)

test: setup  ## Run the tests, two files at a time
	$(PYTHON_VENV) -m pytest tests -q --durations=20 -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

faults: setup  ## Kill runs, fill disks, damage files: over 100 kills and 200 inputs (about 20 minutes on 2 cores)
	$(PYTHON_VENV) -m tests.suites.faults $(ARGS)

cluster-test: setup  ## Run chains of jobs on a real Slurm of two nodes, installed through apt (root; 10 to 15 minutes)
	$(PYTHON_VENV) -m pytest tests/suites/cluster.py -v --durations=10 $(ARGS)

lint: setup  ## Check style and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: setup  ## Mend style and format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: setup  ## Write requirements.lock from pyproject.toml (ARGS=--upgrade takes newer versions)
	.venv/bin/uv pip compile pyproject.toml --group train --group dev --group docs --universal --python-version 3.11 \
		--generate-hashes --no-config --no-emit-index-url --no-emit-find-links --no-header --no-annotate \
		-q -o requirements.lock $(ARGS)

bench: setup  ## Run every benchmark that needs no GPU, briefly: one table, runs/bench.md too (at most 20 minutes on 2 cores)
	$(PYTHON_VENV) -m benchmarks.all $(ARGS)

bench-stages: setup  ## Measure what each stage buys (ARGS name the data and the teacher)
	$(PYTHON_VENV) -m benchmarks.stages $(ARGS)

bench-saving: setup  ## Measure how long training stands still for a checkpoint, beside DeepSpeed's own
	$(PYTHON_VENV) -m benchmarks.saving $(ARGS)

bench-order: setup  ## Measure the windowed order's reading and shuffling against FFCV's orders (root; control groups v1)
	$(PYTHON_VENV) -m benchmarks.order $(ARGS)

bench-probe: setup  ## Compare the probes with scikit-learn's, and measure their memory
	$(PYTHON_VENV) -m benchmarks.probe $(ARGS)

bench-recipes: setup  ## Compare every operator, addition, hybrid and loss on the embedded default (hours; ARGS=--help)
	$(PYTHON_VENV) -m benchmarks.recipes $(ARGS)

bench-foundation: setup  ## Convert a real foundation model and evaluate it (ARGS="--teacher FILE --photos FOLDER --eval FOLDER")
	$(PYTHON_VENV) -m benchmarks.foundation $(ARGS)

bench-gpu: setup  ## Measure the fused kernels and whole models on a GPU; writes runs/bench-gpu.md
	$(PYTHON_VENV) -m benchmarks.gpu $(ARGS)

bench-kernels: setup  ## Build the kernels for sm_80 and sm_90, without a GPU: registers, spills, shared memory
	$(PYTHON_VENV) -m benchmarks.kernels $(ARGS)

bench-resolution: setup  ## Measure time, memory and FLOPs of softmax and linear attention from 224 to 2048 pixels
	$(PYTHON_VENV) -m benchmarks.resolution $(ARGS)

bench-scaling: setup  ## Print docs/scaling.md's tables (ARGS=--check measures what needs no GPU)
	$(PYTHON_VENV) -m benchmarks.scaling $(ARGS)

bench-segmentation: setup  ## Segment the embedded canvases: linear student against softmax baseline, two seeds
	$(PYTHON_VENV) -m benchmarks.segmentation $(ARGS)

bench-step: setup  ## Compare the training step with a bare DeepSpeed loop and with the teacher's forward pass (CPU or GPU)
	$(PYTHON_VENV) -m benchmarks.step $(ARGS)

bench-start: setup  ## Measure CPU seconds from the command to the first step, part by part
	$(PYTHON_VENV) -m benchmarks.start $(ARGS)

bench-loader: setup  ## Measure images a core against torchvision's and timm's loaders (ARGS="--photos FOLDER")
	$(PYTHON_VENV) -m benchmarks.loader $(ARGS)

wheel: setup  ## Build dist/unsoftmax-*.whl, which carries models/ alone
	rm -rf build dist
	.venv/bin/python -m build --no-isolation --wheel

clean:  ## Remove what tools left behind; keeps .venv and runs/
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
