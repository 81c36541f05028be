"""Event log, run state derived from it, progress bars, telemetry and logging.

In: events of a training. Out: events.jsonl, train.log, and their readers; errors here never stop training.
Read first: events.py, then run_state.py.
"""
