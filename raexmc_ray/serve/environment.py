"""Environment variables of a cluster that serves: Serve's processes read them where they start.

`raexmc serve` sets them for the cluster that it starts. Others set them for `ray start` on every node, as
`serve_configs/kuberay.yaml` does. Where they are not set the application answers all the same, more slowly.
"""

ENVIRONMENT = {
    # A flood is refused where it comes in (gate.py), beyond RAEXMC_REQUESTS_AT_A_TIME, which is set beside these.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raexmc_ray.serve.gate:middlewares",
    # A call between deployments is then a message and its reply. By default it is a stream of objects through Ray's
    # store, which takes about twice the time.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # gRPC's own limit is 4 MiB; a request's texts, or what a shard finds for a batch, may be more.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str((1 << 31) - 1),
    # One event loop a process instead of three: what takes long is done in threads, or is all that its process does.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Serve's logs are files, which are rotated. By default each line is written a second time, to the process's stderr,
    # a file that grows for ever.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # What is there at the start is never collected: without that, collections are seen in the slowest answers.
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    # Somebody waits for an answer. By default Ray's workers step back behind every other process of the machine.
    "RAY_worker_niceness": "0",
}

WITHOUT_A_LOOP = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}
"""Of a process that calls replicas from no event loop, on a node where the others have ENVIRONMENT."""
