"""Chooses photos and splits them: which are sampled, which validate, which are left out.

In: photos as found, with groups and codes. Out: rows to keep, each with its split.
Read first: candidates.py, then sampling.py and split.py.
"""
