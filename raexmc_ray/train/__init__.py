"""Ray Train: contrastive training of the shared encoder over the in-batch memory.

Free of Ray: sampler (which rows and labels make up a batch), gather (what ranks tell each other), step (one step's
gradients), mining (hard negatives), validate (held-out figures), checkpoint, curves, meter, and loop, which is the
training of one rank. Ray: tokens (Ray Data), plan (what is refused or announced), worker, trainer (the driver), watch
(what the driver sees of the workers). errors and published (a trained encoder's folder) are for others to import.
"""
