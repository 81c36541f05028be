"""Trains a run: driver, Ray Train trainer, worker, loop.

In: a Run with settings and a manifest. Out: checkpoints, exported best models, events.
Read first: driver.py (order of the tasks), then worker.py and loop.py. step/ has what one step does and how it is
undone, schedule/ how long a task trains, faults/ what to say when it stops. Checkpoints are committed in
runs/checkpoint.py and published by the worker's runs/backend.py.
"""
