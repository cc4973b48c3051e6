"""The gRPC face of the server."""
