"""The C++ kernels that work on plain tensors, wrapped.

    library    which instruction sets this build and this processor have
    gradients  products with rows of gradients
    sampling   tokens drawn at random

The C++ part (csrc/) is optional: without it, or with ``GOSSAMER_ISA=reference``, everything runs on PyTorch.
"""
