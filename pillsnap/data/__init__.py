"""Manifest samples -> batches on the device, in an order that is a function of seed and position.

In: sample tables and a position (epoch, step). Out: DeviceBatch objects for the training loop.
Read first: plan.py (the order), then stream.py, recipes.py and loader.py.
"""
