"""Mirrors a run's events to Weights & Biases in a process of its own.

In: events.jsonl. Out: W&B runs; a failure of W&B is a warning.
Read first: mirror.py, then follower.py.
"""
