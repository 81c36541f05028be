"""Trains a run: driver, Ray Train trainer, worker, loop.

In: a Run with settings and a manifest. Out: checkpoints, exported best models, events.
Read first: driver.py (the order of things), then worker.py and loop.py.
"""
