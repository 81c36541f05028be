"""What stopped a training, in words: cause and advice for an exception, from facts about it.

In: an exception of Ray or of a worker. Out: a line with the likely cause and what to do.
Read first: diagnosis.py, then the table in known_faults.py.
"""
