"""One training step: its parts, the gradients of all workers, bad steps, the averaged model.

In: a batch on the device and a learning rate. Out: the changed model and optimizer, and what the step says of itself.
Read first: training_state.py. Steps are undone in nonfinite.py, and split in microbatch.py when memory runs out.
"""
