"""Computes metrics from arrays of predictions and labels; reads no files, runs no models.

In: predicted and labelled boxes or classes. Out: mAP, accuracy, F1, calibration, end-to-end metrics (fractions 0 to 1).
evidence.py, which combines an answer with possible codes and hints, and limits.py, which decides whether a code is
given, are copied beside exported models.
Read first: detection.py and classification.py.
"""
