"""Ray Train: contrastive training of the shared encoder over the in-batch memory.

sampler: which rows and labels make up each batch, a pure function. gather: embeddings of all ranks, with
gradients. step: one optimiser step. worker: what each training worker runs. trainer: the driver's side.
"""
