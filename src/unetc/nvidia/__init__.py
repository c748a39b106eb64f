"""What building and running NVIDIA engines share: the libraries, what decides an engine, and the cache of engines."""
