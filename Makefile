# `make demo` and `make test` are all the set-up there is: the first call makes .venv, later ones re-use it.
#   ARGS='...'           passed on: make test ARGS='-k sophia', make demo ARGS='--steps-scale 0.05'
#   PYTHON=python3.12    the Python that .venv is made with; naming another one than before makes .venv anew

.PHONY: help bench check demo docs test test-integrations test-oldest lint types wheel clean

# Named after the Python, so that another PYTHON is another stamp. PYTHON not given: any finished .venv will do.
ifeq ($(origin PYTHON),undefined)
INSTALLED := $(firstword $(wildcard .venv/.installed-*) .venv/.installed-python3)
else
INSTALLED := .venv/.installed-$(subst /,-,$(PYTHON))
endif
PYTHON ?= python3

help:
	@echo "make demo   train a small model, grow it, train on; CPU only, no download; under 2 minutes on 2 quiet cores"
	@echo "make check  lint, types and the quick tests; under a minute on 2 quiet cores"
	@echo "make test   the whole CPU test-suite; under 10 minutes on 2 quiet cores"
	@echo "make test-integrations  the frameworks' loops, really installed, in a .venv of their own"
	@echo "make test-oldest  the tests of optimizers and operators beside the oldest torch, in a .venv of its own"
	@echo "make docs   the documentation as a site, into site/, every link checked; under a minute"
	@echo "make bench  measure the goals and compare with the saved run of the same hardware; minutes"
	@echo "make lint   ruff: rules and format; seconds"
	@echo "make types  mypy and pyright on the public API; under a minute"
	@echo "make wheel  build the pure wheel and, where g++ and nvcc are, the compiled ones, into dist/, and try each; minutes"
	@echo "make clean  remove .venv and what builds and tests leave behind"

demo: $(INSTALLED)
	.venv/bin/growkit demo $(ARGS)

# A worker for each core, of one thread each; those of a module that share something costly share a worker, too
# (tests/conftest.py). A test that hangs fails after 5 minutes. Coverage is asked of the whole suite only: a selection
# would always miss the limit.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 .venv/bin/pytest $(or $(ARGS),-n logical --maxprocesses 8 --dist loadgroup --timeout 300 --cov)

# A framework that is missing is an error here; make test skips what it lacks.
test-integrations: .venv-integrations/.installed
	OMP_NUM_THREADS=1 GROWKIT_ALL_INTEGRATIONS=1 .venv-integrations/bin/pytest tests/integrations $(ARGS)

# Not part of .ci/run: on PyPI torch 2.10.0 for Linux comes with CUDA, 7 GB once installed. PyTorch's own index has it
# without: PIP_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_EXTRA_INDEX_URL=https://pypi.org/simple make test-oldest
test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest tests/optim tests/ops -n logical --maxprocesses 8 --dist loadgroup $(ARGS)

# What says within a minute whether a change is sound.
QUICK = tests/typing tests/test_cli.py tests/test_docs.py tests/test_text.py tests/ops/test_kron_plan.py \
	$(addprefix tests/optim/test_,groups.py state.py buckets.py sophia.py)
check: lint
	OMP_NUM_THREADS=1 .venv/bin/pytest -q -n logical --maxprocesses 8 --dist loadgroup $(or $(ARGS),$(QUICK))

docs: .venv/.extra-docs
	.venv/bin/mkdocs build --quiet --strict $(ARGS)

types: $(INSTALLED)
	.venv/bin/pytest -q tests/typing $(ARGS)

# One thread, so that CPU times mean the same on every machine. The run is saved; a slower one than the saved fails.
bench: $(INSTALLED)
	OMP_NUM_THREADS=1 .venv/bin/pytest benchmarks -q --benchmark-enable --benchmark-quiet \
		--benchmark-compare-fail=median:10% $(ARGS)

lint: $(INSTALLED)
	.venv/bin/ruff check
	.venv/bin/ruff format --check

wheel: .venv/.extra-wheel
	packaging/wheels.sh .venv/bin/python

# Another Python's stamp: that .venv goes. torch comes first and alone, so that nothing after it picks another torch.
# Then what the build needs; where it lacks a compiler, growkit is pure Python.
$(INSTALLED): pyproject.toml setup.py Makefile $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "growkit needs Python 3.10 or newer, and '$(PYTHON)' is not: name another, make ... PYTHON=python3.12"; exit 1; }
	$(if $(filter-out $@,$(wildcard .venv/.installed-*)),rm -rf .venv)
	$(PYTHON) -m venv .venv || \
		{ echo "'$(PYTHON) -m venv .venv' failed; on Debian and Ubuntu it needs: apt install python3-venv"; exit 1; }
	@echo "installing torch and growkit's tools into .venv, once; about a minute, more on a slow line"
	@.venv/bin/pip install --quiet torch==2.13.0
	@.venv/bin/pip install --quiet 'setuptools>=77' ninja pybind11
	@.venv/bin/pip install --quiet --no-build-isolation -e '.[dev]'
	@touch $@

# What a target needs beside that: an extra of pyproject.toml.
.venv/.extra-%: $(INSTALLED)
	.venv/bin/pip install --quiet --no-build-isolation -e '.[$*]'
	@touch $@

# litgpt and torchtitan name older versions of what Trainer needs; they work beside the newer ones.
.venv-integrations/.installed: pyproject.toml setup.py Makefile
	$(PYTHON) -m venv .venv-integrations
	@.venv-integrations/bin/pip install --quiet torch==2.13.0
	@.venv-integrations/bin/pip install --quiet 'setuptools>=77'
	@GROWKIT_SKIP_CUDA_BUILD=1 .venv-integrations/bin/pip install --quiet --no-build-isolation -e '.[dev,integrations]'
	@.venv-integrations/bin/pip install --quiet --no-deps litgpt==0.5.13 torchtitan==0.3.0 torch_checkpointing
	@touch $@

# numpy: what Triton 3.6, which this torch brings, interprets kernels with refuses newer ones.
.venv-oldest/.installed: pyproject.toml setup.py Makefile
	$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/pip install --quiet torch==2.10.0
	@.venv-oldest/bin/pip install --quiet 'setuptools>=77'
	@GROWKIT_SKIP_CUDA_BUILD=1 .venv-oldest/bin/pip install --quiet --no-build-isolation -e '.[dev]' 'numpy<2.3'
	@touch $@

clean:
	rm -rf .venv .venv-integrations .venv-oldest build dist site growkit.egg-info
	rm -rf .coverage* .pytest_cache .ruff_cache .mypy_cache .hypothesis
