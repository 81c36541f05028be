"""Computes metrics from arrays of predictions and labels; reads no files, runs no models.

In: predicted and labelled boxes or classes. Out: mAP, accuracy, F1, calibration, end-to-end metrics (fractions 0 to 1).
evidence.py, which is copied beside exported models, combines an answer with possible codes and hints.
Read first: detection.py and classification.py.
"""
