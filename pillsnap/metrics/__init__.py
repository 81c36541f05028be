"""Computes metrics from arrays of predictions and labels; reads no files, runs no models.

In: predicted and labelled boxes or classes. Out: mAP, accuracy, F1, calibration, end-to-end metrics (fractions 0 to 1).
Read first: detection.py and classification.py.
"""
