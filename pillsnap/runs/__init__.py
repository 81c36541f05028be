"""A run on disk or in remote storage: directory, checkpoints, locks.

In: state dictionaries and files of a run. Out: committed checkpoints and their pointer files.
Read first: directory.py, checkpoint.py (commits), then backend.py (publishes: a folder, or relay and remote storage).
"""
