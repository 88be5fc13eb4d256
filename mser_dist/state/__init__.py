"""Keeps the training state: every rank's slices without pickle, sealed, published at once, read by any number of ranks.

All of DeepSpeed's private attributes that it needs are in `deepspeed_parts.py`, at the top of the package.
"""
