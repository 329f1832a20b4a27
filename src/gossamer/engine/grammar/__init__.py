"""Completions that follow a grammar: after each token, which tokens may come next.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance): a derivative-based lexer and an Earley parser
walk over a trie of the vocabulary. Mostly a mask takes tens of microseconds; what it takes at worst, nobody can say. So
each grammar has a process of its own, with a budget, and the engine waits for no mask longer than a step can bear.

    GrammarCompiler -> Grammar, a process (program.py) -> Constraint, one completion's place in it
"""

from gossamer.engine.grammar.compiler import GrammarCompiler
from gossamer.engine.grammar.constraint import Constraint

__all__ = ["Constraint", "GrammarCompiler"]
