"""One backend a file, which may have further ones; its module has `open_backend(target, threads, memory)`."""
