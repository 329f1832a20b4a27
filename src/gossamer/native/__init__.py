"""Native decoders for CPUs: a model recorded once as a program, which computes a step in one call.

    weights   layers of a PyTorch model, packed
    recorder  the program: ops over buffers
    decoder   the models, as calls of the recorder

Without the C++ part (see :mod:`gossamer.kernels`) there are none, and everything runs on PyTorch.
"""
