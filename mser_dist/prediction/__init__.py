"""Asks a trained model about recordings: `mser predict`, `mser_dist.load_model`, and the model that MLflow serves.

Needs an export alone: no config, no shards, no training.
"""
