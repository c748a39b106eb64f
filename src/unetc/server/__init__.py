"""The server: HTTP APIs in front of the batcher, one module per API."""
