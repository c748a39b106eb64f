"""One backend a file; each module has `open_backend(threads, memory)`."""
