"""Says what a training will need and how long it will take, before a GPU is asked for: memory, traffic, time, cost.

The parts are named in README.md beside this file, with the formulas and their sources. `planning.plan.plan` is the
door for other rooms.
"""
