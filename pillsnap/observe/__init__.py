"""What a run leaves behind: the event log (the truth) and the views and mirrors that only read it."""
