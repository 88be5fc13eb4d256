"""Keeps a run's record: its folder, log.jsonl, MLflow, plots. Knows nothing of what a run computes."""
