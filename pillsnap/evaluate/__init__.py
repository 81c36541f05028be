"""Evaluates a run against its targets, and predicts on photos.

In: a run directory and its manifest. Out: metrics.json, report.html, predictions.
Read first: evaluator.py.
"""
