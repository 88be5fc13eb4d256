"""Turns a set of shards into batches: order, balance, packing, workers, augmentation, features.

What is read when is a pure function of (seed, epoch, step). Knows nothing of models or of training.
"""
