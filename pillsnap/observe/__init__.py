"""What a run says of itself: the event log, the state read from it, progress, telemetry, logs.

In: events of a training. Out: events.jsonl, train.log, and views of them; nothing here can stop a training.
Read first: events.py, then state.py.
"""
