"""The command line: one function a verb, a thin layer over the rooms below. The top floor: it may use every room.

Heavy imports stay inside the verbs, so that ``mser --help`` and a typo answer at once.
"""
