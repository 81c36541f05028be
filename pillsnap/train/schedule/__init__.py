"""How long a task trains: its epochs, its learning rate with the decay at the end, and the time that it may take.

In: settings, samples, the run's log. Out: StreamPlan, Schedule, TimeBudget.
Read first: lr_schedule.py. budget_clock.py, beside the loop, measures whether a task keeps its time.
"""
