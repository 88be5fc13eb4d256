"""Ranks of a job: how they meet, stop, fail and start again."""
