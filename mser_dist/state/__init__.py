"""Keeps the training state: every rank's slices without pickle, sealed, published at once, read by any number of ranks.

All of DeepSpeed's private attributes that this project touches are in `partitions.py`.
"""
