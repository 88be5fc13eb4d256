"""Lets the ranks of one job meet, agree, watch each other and stop together.

`distributed.py` is the only reader of RANK, WORLD_SIZE and SLURM_*. What a *job* is lives above, in `jobs`.
"""
