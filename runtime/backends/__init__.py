"""One backend a file, which may have further ones of its own; its module has `open_backend(place, threads, memory)`."""
