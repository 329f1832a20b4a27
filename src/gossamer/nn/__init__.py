"""Modules whose weights are int8, or stay in the blocks of a quantized file."""

from gossamer.nn.int8_embedding import Int8Embedding, Int8TiedHead
from gossamer.nn.int8_linear import Int8Linear
from gossamer.nn.quantize import QuantizationReport
from gossamer.nn.sparse_int8_linear import SparseInt8Linear
from gossamer.nn.stored_linear import StoredEmbedding, StoredLinear
from gossamer.nn.stored_matrix import StoredMatrix

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "Int8TiedHead",
    "QuantizationReport",
    "SparseInt8Linear",
    "StoredEmbedding",
    "StoredLinear",
    "StoredMatrix",
]
