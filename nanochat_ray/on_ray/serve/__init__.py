"""A model on Ray Serve: ingress replicas speak HTTP, engine replicas decode."""
