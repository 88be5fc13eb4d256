"""Keeps clips on disk: tars, their indexes and columns, journal, verification, remote copies; and the data contract:
the fields of a sample (`index.py`) and the names of emotions (`emotions.py`).
"""
