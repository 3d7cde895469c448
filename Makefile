# make report | test | check | soak | bench | gpu | book | figures | publish | lock | clean; variables: DATASET STUDY PYTHON
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif
STUDY  ?= quick
VENV   := .venv
STAMP  := $(VENV)/.made-from-$(shell cat requirements.lock pyproject.toml | cksum | tr ' ' '-')
# Two processes: torch computes with all cores in each, and a file of tests stays in one.
PYTEST := pytest -q -n 2 --dist loadfile
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
.DEFAULT_GOAL := help
.PHONY: help install report test check soak bench gpu book figures publish lock clean

help:
	@echo "make report   train the quick study (7 heads, a few minutes) and build the book from it"
	@echo "make test     the notebooks' tests, then pytest"
	@echo "make soak     long tests of crashes, faults, kills and hostile input, over an hour; counts in SOAK_REPORT"
	@echo "make check    what a change must pass: export in step, tests, the book without a warning"
	@echo "make book     the book alone      make figures   CRNet and the scans, drawn      make install   .venv alone"
	@echo "make bench    speed and memory against peers, on a quiet machine: tables in results/benchmarks"
	@echo "make gpu      on a machine with a GPU: kernel tests, the same tables, and a small study"
	@echo "make publish  copy a study's records to results/      make lock   renew requirements.lock"
	@echo "make clean    remove the built book; runs and .venv stay"
	@echo "DATASET=digits trains on another set; STUDY=report another study; PYTHON=python3.12 another Python"

# The environment is made from the lock file; its stamp carries the checksum, so that it is used again while that is the same.
install: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making $(VENV) with $(PYTHON): about 7 GB and a few minutes, once."
	@rm -f $(VENV)/.made-from-*
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu, python3-venv must be installed."; exit 1; }
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# The book is built whatever the study's end, so that a failed experiment is seen there.
report: $(STAMP)
	@study=0; thesis-ltc study $(STUDY) $(if $(DATASET),--set data=$(DATASET)) || study=$$?; \
	book=0; thesis-ltc book || book=$$?; \
	test $$study -eq 0 || echo "make report: the study $(STUDY) is not complete; what failed is named above and shown as failed in the book"; \
	test $$book -eq 0 || echo "make report: the book has faults, named above"; \
	test $$study -eq 0 -a $$book -eq 0

test: $(STAMP)
	@notebooks=0; OMP_NUM_THREADS=1 nbdev_test --n_workers 2 || notebooks=$$?; \
	test $$notebooks -eq 0 || echo "make test: a notebook's test failed, see above"; \
	$(PYTEST) && exit $$notebooks

# The counts of what was tried go to a folder, a JSON file a test.
SOAK_REPORT ?= results/soak
SOAK_TESTS  := $(addprefix tests/test_,kills.py crash_orders.py faults.py doctored.py hostile.py environment.py)
soak: $(STAMP)
	@rm -rf "$(SOAK_REPORT)"
	@THESIS_LTC_SOAK=1 THESIS_LTC_SOAK_REPORT="$(SOAK_REPORT)" $(PYTEST) $(SOAK_TESTS) && cat "$(SOAK_REPORT)"/*.json

check: $(STAMP)
	nbdev_export
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2
	nbdev_clean
	git diff --exit-code -- nbs thesis_ltc
	ruff check
	lint-imports
	thesis-ltc book
	$(PYTEST)

bench: $(STAMP)
	@python benchmarks/circuits.py && python benchmarks/steps.py && python benchmarks/inference.py && python benchmarks/frozen.py && python benchmarks/augmentation.py && python benchmarks/allocator.py

# On a machine without a package index: PYTHONPATH has the packages that torch does not bring, and GPU_PYTHON names its Python.
GPU_PYTHON ?= $(VENV)/bin/python
gpu:
	@$(GPU_PYTHON) -c "import torch; assert torch.cuda.is_available(), 'make gpu: torch sees no GPU'"
	@$(GPU_PYTHON) -m pytest -q tests/test_ltc_gpu.py
	@$(GPU_PYTHON) benchmarks/circuits.py --device cuda
	@$(GPU_PYTHON) benchmarks/steps.py --device cuda
	@$(GPU_PYTHON) benchmarks/frozen.py --data digits --image-size 64 --epochs 20

book: $(STAMP)
	@thesis-ltc book

figures: $(STAMP)
	@thesis-ltc figures

publish: $(STAMP)
	@thesis-ltc publish $(STUDY)

# The set that is installed becomes the lock; wheels for NVIDIA's GPUs exist for Linux on x86-64 alone.
lock: $(STAMP)
	@{ echo "# The exact set that the book was built with. Written by 'make lock' from the installed packages, $$(python -V)."; \
	   python -m pip freeze --disable-pip-version-check --exclude-editable --exclude thesis_ltc \
	   | sed -E '/^(nvidia-|cuda-|triton==)/ s/$$/ ; sys_platform == "linux" and platform_machine == "x86_64"/'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@touch $(VENV)/.made-from-$$(cat requirements.lock pyproject.toml | cksum | tr ' ' '-')

clean:
	rm -rf _build appendix
