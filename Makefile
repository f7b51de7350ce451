# make demo    on a fresh machine: install into .venv, then run a small real model in less memory than its weights take
# make test    the tests: first those that need the machine alone, then the others in two processes
# make check   lint, format, types, import contracts
# make versions   the tests marked `versions` with the least and the newest transformers that pyproject.toml allows
# make bench   the quick benchmark
#
# Another interpreter: make PYTHON=python3.12 demo. Where packages come from is pip's own configuration (PIP_INDEX_URL
# and the like); a CPU-only build of torch, which is much smaller, is enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# constraints.txt has the version between these two, with which all else is tested.
TRANSFORMERS := 5.17.0 5.24.0

.PHONY: demo test check versions bench

demo: $(INSTALLED)
	$(BIN)/headrace demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m alone; alone=$$?; \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone" && exit $$alone

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

versions: $(TRANSFORMERS:%=$(VENV)/transformers-%/.installed)
	for version in $(TRANSFORMERS); do \
	  echo "transformers $$version"; \
	  $(VENV)/transformers-$$version/bin/python -m pytest -n 2 -m versions || exit 1; \
	done

# An environment that takes from $(VENV) all but transformers and what that version needs otherwise.
$(VENV)/transformers-%/.installed: $(INSTALLED)
	$(BIN)/python -m venv --without-pip --clear $(@D)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth
	$(@D)/bin/python -m pip install --disable-pip-version-check transformers==$*
	@touch $@

bench: $(INSTALLED)
	@echo "The quick benchmark; bench/METHODOLOGY.md says how the published figures are taken."
	$(BIN)/python bench/run_all.py --quick

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("headrace needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[run,dev]'
	@touch $@
