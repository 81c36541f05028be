"""The detector, the classifier, their losses and their arithmetic precision.

In: settings and weights. Out: torch modules and loss tensors.
Read first: detector.py and classifier.py.
"""
