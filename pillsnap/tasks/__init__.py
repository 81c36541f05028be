"""Everything that differs between detection and classification.

In: settings and class codes. Out: a Task: samples, recipe, model, training and validation step, export.
Read first: base.py (the contract), then detection.py and classification.py.
"""
