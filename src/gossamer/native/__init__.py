"""Native kernels for CPUs: a decoder recorded once as a program, which computes a step in one call.

    library   which instruction sets this build and this processor have
    weights   layers of a PyTorch model, packed
    recorder  the program: ops over buffers
    decoder   the models, as calls of the recorder
    sampling  tokens drawn at random

The C++ part (csrc/) is optional: without it, or with ``GOSSAMER_ISA=reference``, everything runs on PyTorch.
"""
