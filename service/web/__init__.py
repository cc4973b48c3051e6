"""The HTTP face of the server: metrics and probes."""
