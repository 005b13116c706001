# `make demo` and `make test` create what they need. Another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
BIN := .venv/bin
WEIGHTS := --ckpt_dir models/tiny-Wan2.2-TI2V-5B --vlm_path models/tiny-InternVL
DEMO := outputs/demo
CLIP := examples/shapes.mp4

.PHONY: demo test lint format lock reference mutants clean

demo: .venv/.ready
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/python generate.py $(WEIGHTS) --video $(CLIP) --base_seed 0 --save_file $(DEMO)/continued.mp4
	$(BIN)/python generate_continuous.py $(WEIGHTS) --video $(CLIP) --base_seed 0 --continuation tail --num_videos 3 \
		--output_dir $(DEMO)/chain
	$(BIN)/python examples/contact_sheet.py $(DEMO)/contact_sheet.png $(CLIP) $(DEMO)/continued.mp4 $(DEMO)/chain/joined.mp4
	@echo
	@echo "A tiny model made for this demo (models/README.md) has continued the clip:"
	@echo "  one continued clip  $(CURDIR)/$(DEMO)/continued.mp4"
	@echo "  a chain of three    $(CURDIR)/$(DEMO)/chain/joined.mp4"
	@echo "  all at a glance     $(CURDIR)/$(DEMO)/contact_sheet.png"

test: lint
	$(BIN)/python -m pytest

lint: .venv/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The lock constrains versions and is no list of what to install, so that a CPU build of torch brings no CUDA packages.
.venv/.ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint requirements.lock --editable ".[dev]"
	touch $@

# The page of all flags, from wan/options.py.
reference: .venv/.ready
	$(BIN)/python -m wan.commands.flags > docs/commands.md

# The share of small faults that the tests see, by package: hours. For less: make mutants MUTANTS="--count 5 wan/chain"
mutants: .venv/.ready
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[mutants]"
	$(BIN)/python -m benchmarks.mutants $(MUTANTS)

# Keeps the versions in the file wherever they still fit pyproject.toml; remove a line to let that package move.
lock:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet "uv>=0.13,<0.14"
	build/uv/bin/uv pip compile --quiet --universal --python-version 3.10 --no-python-downloads --all-extras \
		--no-annotate --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

clean:
	rm -rf .venv build outputs .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
