"""Manifest samples -> batches on the device, in an order that is a function of seed and position.

In: sample tables and a position (epoch, step). Out: DeviceBatch objects for the training loop.
Read first: plan.py (the order), then stream.py, recipes.py and loader.py.

Order: `StreamPlan.slot(number)` gives the samples of one worker in one step. Permutation p of all samples is drawn from
(seed, p), so it does not depend on workers, nodes or restarts; an epoch takes the next samples of these permutations.

Augmentation: `augment.sample_rng(seed, p, sample_id)` gives a sample's random numbers in permutation p. A sample that
is made twice, in any process, is the same.

Decoding: a photo is decoded in a Ray Data task (or in an actor that runs such tasks), which returns pixels; or, with
`Stream.ship_bytes`, in a decode worker (decode_workers.py), a process of the train worker that gets encoded bytes.
`train/trainer.py` chooses by the setting `data.decode_in`; `auto` means decode workers if there is a store, no GPU and
at most 4 CPUs, and tasks otherwise.
"""
