"""Shared by building and running NVIDIA engines: the libraries, the keys of engines, and the cache of engines."""
