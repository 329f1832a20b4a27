"""Vectors and scores of texts, by encoders and by decoders.

loading    a checkpoint becomes a network without an output layer
linears    its linear layers, in int8 or floating point, on the kernels of csrc/ where they are
encoder    BERT's relatives, as one definition over such layers; `network` runs any other model of transformers
texts      texts, pairs and token ids, checked and cut
model      tokens become vectors or scores: sorted by length, without padding
ranking    how well documents answer a query
"""
