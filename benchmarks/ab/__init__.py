"""Simulated experiments: traffic whose noise is as correlated as a server's, and the router's own decisions on it."""
