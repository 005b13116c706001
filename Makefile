# `make demo` and `make test` create what they need. Another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
BIN := .venv/bin
WEIGHTS := --ckpt_dir models/tiny-Wan2.2-TI2V-5B --vlm_path models/tiny-InternVL
DEMO := outputs/demo
CLIP := examples/shapes.mp4
CHECKED := --require-hashes --constraint requirements.lock
COMPILE := build/uv/bin/uv pip compile --quiet --universal --python-version 3.10 --no-python-downloads --no-annotate \
	--generate-hashes --custom-compile-command "make lock"
TORCH := $(shell grep -o "^torch==[^ ]*" requirements.lock)

.PHONY: help demo quick test test-all lint format lock audit reference docs mutants clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed  ## continue a clip and make a chain of three with the tiny model
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/python generate.py $(WEIGHTS) --video $(CLIP) --base_seed 0 --save_file $(DEMO)/continued.mp4
	$(BIN)/python generate_continuous.py $(WEIGHTS) --video $(CLIP) --base_seed 0 --continuation tail --num_videos 3 \
		--output_dir $(DEMO)/chain
	$(BIN)/python examples/contact_sheet.py $(DEMO)/contact_sheet.png $(CLIP) $(DEMO)/continued.mp4 $(DEMO)/chain/joined.mp4 \
		--seams $(DEMO)/chain
	@echo
	@echo "A tiny model made for this demo (models/README.md) has continued the clip:"
	@echo "  one continued clip  $(CURDIR)/$(DEMO)/continued.mp4"
	@echo "  a chain of three    $(CURDIR)/$(DEMO)/chain/joined.mp4"
	@echo "  all at a glance     $(CURDIR)/$(DEMO)/contact_sheet.png"
	@echo "  the chain's report  file://$(CURDIR)/$(DEMO)/chain/report.html"

# Two processes with a thread each: with more threads than cores most of their time goes to waiting for each other.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

quick: .venv/.ready  ## the tests that are not marked slow
	$(TESTS) -m "not slow"

test: lint  ## lint, format, types and all tests, as CI runs them
	$(TESTS)

test-all: lint demo  ## the same with the demo, ten times the fuzzing, and the share of wan/ that the tests run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --rare --fuzz 10 --cov --cov-report=term:skip-covered

lint: .venv/.ready  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.ready  ## lay out the code, and mend what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The lock constrains and is no list of what to install, so that a CPU build of torch brings no CUDA packages. All that
# comes from an index is checked against its hashes, also torch. Only a torch that pip finds on this machine's own disk
# (find-links), or that is in .venv already, is taken as it is: other builds, say for the CPU, have other hashes.
.venv/.installed: pyproject.toml requirements.lock requirements-pip.lock
	@echo "This makes a Python environment in .venv and downloads what the lock lists, once: PyTorch (3 GB with CUDA's"
	@echo "packages on Linux, 6 GB on disk; 0.2 GB on a Mac) and 0.3 GB of others. No weights: the demo's are in models/."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements-pip.lock
	$(BIN)/python -m pip install --quiet --no-index --no-deps "$(TORCH)" 2>/dev/null || echo "$(TORCH) is not on this disk"
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip install $(CHECKED) wan-continue
	touch $@

.venv/.ready: .venv/.installed  # and the developers' tools
	$(BIN)/python -m pip install $(CHECKED) "wan-continue[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(CHECKED) spandrel einops  # a torchvision for any torch is not to be had
	touch $@

reference: .venv/.ready  ## docs/commands.md, the page of all flags, from wan/options.py
	$(BIN)/python -m wan.commands.flags > docs/commands.md

docs: .venv/.ready reference  ## the site of docs/ in build/site; a broken link or anchor fails
	$(BIN)/python -m pip install --quiet $(CHECKED) "wan-continue[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

# For a few of them: make mutants MUTANTS="--count 5 wan/chain"
mutants: .venv/.ready  ## the share of small faults that the tests see, by package; takes hours
	$(BIN)/python -m pip install --quiet $(CHECKED) "wan-continue[mutants]"
	$(BIN)/python -m benchmarks.mutants $(MUTANTS)

# Keeps the versions in the file wherever they still fit pyproject.toml; remove a line to let that package move.
lock:  ## move requirements.lock to what pyproject.toml asks for
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet "uv>=0.13,<0.14"
	$(COMPILE) --all-extras --output-file requirements.lock pyproject.toml
	$(COMPILE) --group setup --constraint requirements.lock --output-file requirements-pip.lock

# In an environment of its own: what it needs is no part of what is looked at. A package that cannot be looked up fails.
audit:  ## known vulnerabilities of the versions in requirements.lock
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet "pip-audit>=2.9,<3"
	build/audit/bin/pip-audit --strict --require-hashes --disable-pip \
		--requirement requirements.lock --requirement requirements-pip.lock

clean:  ## remove .venv, outputs and caches
	rm -rf .venv build outputs .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
