"""Ray Serve: HTTP ingress, text encoder and one deployment per memory shard."""
