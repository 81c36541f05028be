"""PillSnap: train, judge and run a two-stage pill recogniser."""
