"""Trains a run: driver, Ray Train trainer, worker, loop.

In: a Run with settings and a manifest. Out: checkpoints, exported best models, events.
Read first: driver.py (order of the tasks), then worker.py and loop.py. Steps are undone in nonfinite.py, checkpoints
committed in runs/checkpoint.py and published by the worker's runs/backend.py. schedule/ has how long a task trains,
faults/ what to say when it stops.
"""
