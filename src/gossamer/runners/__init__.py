"""What computes a model, behind the contract of :mod:`gossamer.engine.runner`.

choose        which runner a model gets
native        a supported decoder on the CPU, by its native program
step_input    a plan as the arrays that this program reads
tolerance     attention to long shared prefixes within a tolerance
transformers  any Hugging Face decoder, on any device
planned_step  attention of a plan in PyTorch
timing        how long that takes, for the cost model
"""
