PYTHON ?= python3
PIP = .venv/bin/python -m pip
# On a machine with a CUDA device, `make CONSTRAINTS=` installs the GPU build of torch.
CONSTRAINTS ?= -c constraints.txt

.PHONY: venv demo test lint docs wheel bench s3 clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev,s3]'
	touch $@

venv: .venv/installed

demo: venv
	.venv/bin/histosge demo --out demo

test: venv
	.venv/bin/python -m pytest

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# The site, into build/site; a warning is an error.
.venv/docs-installed: .venv/installed
	$(PIP) install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[docs]'
	touch $@

docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

wheel: venv
	rm -rf dist
	.venv/bin/python -m build --outdir dist .

# A local S3 server to try things on: prints how to reach it.
s3: venv
	.venv/bin/python benchmarks/_s3.py

bench: venv
	for file in benchmarks/[a-z]*.py; do .venv/bin/python $$file --quick || exit 1; done

clean:
	rm -rf .venv demo build dist *.egg-info
