"""Mirrors a run's events to Weights & Biases in a separate process.

In: events.jsonl. Out: W&B runs; a failure of W&B becomes a warning.
Read first: mirror.py, then follower.py.
"""
