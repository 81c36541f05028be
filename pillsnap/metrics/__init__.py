"""Arrays of predictions and labels in, numbers out; no files, no models.

In: predicted and labelled boxes or classes. Out: mAP, accuracy, F1, calibration, end-to-end metrics (fractions 0 to 1).
Read first: detection.py and classification.py.
"""
