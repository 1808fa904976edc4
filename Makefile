# make demo         sets everything up and embeds the bundled proteins
# make example      the same with labelled proteins, and learns from their embeddings
# make test         sets everything up and runs the tests
# make test-slurm   only those that start a Slurm of their own
# make mutants      changes the code in small ways, and says which changes no test notices; ONLY=word tries some
# make test-tools   with other tools, which it installs: transformers, peft, scikit-bio, ProtSpace, Scanpy, FAISS
# make check        lint, format and types
# make lock         resolves requirements.lock anew

PYTHON ?= python3
BIN := .venv/bin
# One more than there are processors, up to five: some tests wait for other processes.
TESTERS := $(shell $(PYTHON) -c 'import os; print(min(5, 1 + len(os.sched_getaffinity(0))))')

.PHONY: demo example test test-slurm test-tools mutants check lock library.files clean

.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "esmflow needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	touch $@

demo: .venv/installed
	@model=$$($(BIN)/python workflow/scripts/fetch_small_model.py) && \
	rm -f results/demo/summary.txt && \
	$(BIN)/snakemake --cores 2 --resources gpu=2 --quiet rules host reason --configfile config/demo/config.yaml --config model="$$model"

example: .venv/installed
	@model=$$($(BIN)/python workflow/scripts/fetch_small_model.py) && \
	$(BIN)/snakemake --cores 2 --resources gpu=2 --quiet rules host reason --snakefile examples/enzymes/Snakefile --config model="$$model"

test: .venv/installed
	@$(BIN)/python workflow/scripts/fetch_small_model.py --package --cache resources/models >/dev/null
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder --durations 25

# Not in CI: it takes a quarter of an hour.
mutants: .venv/installed
	@$(BIN)/python workflow/scripts/fetch_small_model.py --package --cache resources/models >/dev/null
	$(BIN)/python tests/mutants.py --only "$(ONLY)"

test-slurm: .venv/installed
	$(BIN)/python -m pytest tests/slurm

test-tools: .venv/installed
	$(BIN)/python tests/stress/saved_by_transformers.py
	$(BIN)/python tests/stress/merged_by_peft.py
	$(BIN)/python tests/stress/read_by_other_tools.py
	$(BIN)/python tests/stress/nearest_with_faiss.py

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check workflow examples
	$(BIN)/mypy
	$(BIN)/snakemake --lint

# torch's own metadata pins the CUDA packages that belong to it; listing them would force them on machines without a GPU.
# Triton stays, in the version that torch pins: its interpreter runs the GPU kernels in the tests, on machines without one.
lock: .venv/installed
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --no-annotate --no-header --upgrade \
	  | grep -vE '^(nvidia-(cu|nc|nv)|cuda-)' > requirements.lock

# Every file that scripts import or read: what a deployment from a git host fetches.
library.files:
	cd workflow && git ls-files --cached --others --exclude-standard scripts/esmflow report | LC_ALL=C sort > library.files

clean:
	rm -rf results logs .snakemake
