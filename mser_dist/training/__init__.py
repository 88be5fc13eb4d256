"""Trains: the loop (open `loop.py` first), the two stages, DeepSpeed behind `engine.py`, steps that are not finite.

Uses all the rooms below, evaluation for its validation; knows nothing of jobs or of the command line.
"""
