"""Scores the labels of clips, measures, and publishes the zero-shot table. Needs no training: an export is enough."""
