# Everything happens in .venv, made on first use. Needed: Python >= 3.10, a C++ compiler and make.
PYTHON ?= python3
# The torch to install; TORCH="torch==2.11.0" (or a wheel's path) overrides it.
TORCH ?= torch==2.13.0
# Processes that run the tests, each on one thread.
WORKERS ?= 2
PIP = .venv/bin/python -m pip --disable-pip-version-check
SOURCES = CMakeLists.txt pyproject.toml $(shell find csrc -type f) \
          $(shell find python grgauge_kernels -type d -not -name __pycache__ -not -path '*/lib')

.PHONY: help demo examples test test-fast lint docs bench bench-gpu data evidence wheel clean
help:
	@echo "make demo   train a small transformer three times and read the gauges"
	@echo "make examples  gauges in other frameworks' loops, one file each"
	@echo "make test   lint, type check, documentation and all tests"
	@echo "make test-fast  the same without ranks, engines, compiled GPU kernels, whole trainings and documentation"
	@echo "make docs   the documentation as a site, into site/"
	@echo "make bench  AdamW with and without gauges against torch's, tables into README and docs/speed.md"
	@echo "make bench-gpu  on a machine with a GPU: build, device tests and measurements in under 8 minutes"
	@echo "make data   fetch the data of bench/families into build/data"
	@echo "make evidence  judge tuners on the table of recorded runs, live ones on FAMILY; rows, pictures and page"
	@echo "make wheel  one wheel for every Python and torch, into dist/"
	@echo "make clean  remove .venv and what was built"

.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet "$(TORCH)" numpy
	@touch $@

# Editable: edits to Python files take effect at once; new files and changes of the C++ sources install again.
.venv/built: .venv/torch $(SOURCES)
	$(PIP) install --quiet --editable ".[dev]"
	@touch $@

demo: .venv/built
	.venv/bin/grgauge demo

examples: .venv/built
	.venv/bin/python examples/transformers_trainer.py
	.venv/bin/python examples/lightning_trainer.py
	.venv/bin/python examples/accelerate_loop.py
	.venv/bin/python examples/optuna_search.py
	.venv/bin/python examples/ray_tune.py

PYTEST = .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST)

test-fast: lint
	$(PYTEST) -m "not (slow or ranks or engines or static or simulated or pages)"

docs: .venv/built
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

lint: .venv/built
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: .venv/built
	.venv/bin/python -m pytest bench --benchmark-columns=median,iqr,min,rounds --benchmark-sort=name --benchmark-autosave
	.venv/bin/python bench/tables.py

# With the machine's own python and torch: such a machine may have no network to make a .venv from.
bench-gpu:
	$(PYTHON) bench/gpu.py

data: .venv/built
	.venv/bin/python bench/families/fetch.py

# Opponents are replayed on all families of the table; two seeds of the live tuners train on one.
FAMILY ?= recommendation
evidence: data
	cd bench && ../.venv/bin/python -m judge.evidence
	cd bench && OMP_NUM_THREADS=1 ../.venv/bin/python -m judge.evidence $(FAMILY) --live 2
	cd bench && ../.venv/bin/python -m judge.pictures

wheel:
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist site
