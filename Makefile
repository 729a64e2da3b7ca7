PYTHON ?= python3
# Versions of everything, for machines without a GPU, made by .ci/make_constraints.
# On a machine with a CUDA device, `make CONSTRAINTS=` installs the GPU build of torch.
CONSTRAINTS ?= -c constraints.txt

# uv installs in 6 s what takes pip more than 100; where it is not there, it goes into the environment.
# It does not read pip's settings: it is told where local wheels and another index are. Where it cannot install, pip does.
UV = $(shell command -v uv || echo .venv/bin/uv)
PLACES = $(addprefix --find-links=,$(PIP_FIND_LINKS)) $(addprefix --default-index=,$(PIP_INDEX_URL))
install = $(UV) pip install --quiet --python .venv/bin/python $(PLACES) $(CONSTRAINTS) -e '$(1)' \
	|| .venv/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '$(1)'
# Variables, since a comma would end an argument of `call`.
EXTRAS = s3,view
DEV = dev,$(EXTRAS)
DOCS = docs,$(EXTRAS)
# As pip does: certificates of the machine, not uv's own (a proxy may have one of its own).
export UV_SYSTEM_CERTS = true

# A container that forbids Python to keep bytecode makes each process compile 1,500 modules anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: venv demo test test-all lint docs wheel bench s3 clean

# What a user needs.
.venv/installed-user: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	command -v uv > /dev/null || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(call install,.[$(EXTRAS)])
	touch $@

# What tests, types and benchmarks need as well.
.venv/installed-dev: .venv/installed-user
	$(call install,.[$(DEV)])
	touch $@

venv: .venv/installed-dev

demo: .venv/installed-user
	.venv/bin/histosge demo --out demo

# One process a core that is ours. Each starts with a part of the files, so that what a file prepares is prepared once.
PYTEST = .venv/bin/python -m pytest --numprocesses auto --dist worksteal

test: venv
	$(PYTEST)

# Also what takes long: killed workers, troubled servers, the guide, the wheel.
test-all: venv
	$(PYTEST) --e2e --slow

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# The site, into build/site; a warning is an error.
.venv/installed-docs: .venv/installed-user
	$(call install,.[$(DOCS)])
	touch $@

docs: .venv/installed-docs
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
