"""Many replicas of one model behind one address, on Ray Serve.

    client -> ingress (HTTP, keys, routing) -> a replica's own HTTP server -> Answering -> EngineLoop -> Engine

Ray places replicas, watches, scales and drains them, and carries one small message for each request, the lease. The
bytes of answers go over HTTP from the replica to the ingress: Ray's own streams take about a millisecond of processor
time for each token.
"""
