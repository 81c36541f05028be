"""Checks whether a manifest is fit to train on, without changing anything.

In: a manifest and a data root. Out: findings, printed and as JSON.
Read first: audit.py.
"""
