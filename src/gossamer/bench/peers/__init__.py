"""Other projects, each in an environment and a process of its own, decoding the same prompts.

``process.py`` talks to one of them, ``models.py`` writes the model in its format, ``contest.py`` gives all of them
their turns. ``child.py`` and the scripts beside it run on the other side and import nothing of Gossamer.
"""
