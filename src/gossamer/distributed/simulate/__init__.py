"""Fleets of replicas, simulated: the real routers, the engine's rules for memory and steps, measured step times."""
