"""Keeps what a frozen encoder makes of each clip, so that it is computed once."""
