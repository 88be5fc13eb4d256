"""Submits, sweeps and queues again trainings and evaluations, and asks what a machine can do.

Above the training: a job starts it as a user would. Only the command line is above.
"""
