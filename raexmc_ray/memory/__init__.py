"""The knowledge memory: keys (embeddings of instances and labels) and values (the labels they vote for).

index: FAISS, exact to the last tie. hits: what a search finds, and how shards' answers merge. shard: a part of
the memory in one process. snapshot: the format on disk. write: a snapshot from embeddings. Free of Ray up to
here; build and pool are the Ray side: embeddings to shards, shards in actors.
"""
