"""Parallel machine learning on MPI: a small autograd engine on numba kernels in every rank.

===================  ==================================================================
mpiml.kernels        numba kernels: plain arrays in, plain arrays out
mpiml.tensor         Tensor, op, backward: reverse-mode differentiation
mpiml.replay         Replay: a step recorded once and repeated as a program
mpiml.ops            the derivative table: relu, conv2d, cross_entropy, ...
mpiml.nn             layers and the combinators that build a model
mpiml.optim          SGD, Adam, AdamW, LARS, LAMB and learning-rate schedules on flat vectors
mpiml.data           readers and batches
mpiml.save           weights, models and checkpoints in safetensors files
mpiml.describe       models as JSON, and built again from it
mpiml.predict        python -m mpiml predict: what a saved model says of the rows of a file
mpiml.schedule       pipeline schedules: lists, simulated and drawn
mpiml.report         python -m mpiml report: how a run goes or went, as a page
mpiml.check          python -m mpiml check: what is wrong with this machine or this job
mpiml.parallel       Grid, place, gradient, predict: the only part that starts MPI
===================  ==================================================================
"""

from . import cores, memory

cores.share_cores()  # before NumPy loads
memory.keep_freed_memory()

with memory.without_collector():  # importing numba makes 200,000 objects, and nothing that could be freed
    from . import data, kernels, nn, ops, optim
    from .replay import Replay
    from .tensor import Tensor, op

__version__ = "0.1.0"
__all__ = ["Replay", "Tensor", "data", "kernels", "nn", "op", "ops", "optim"]
