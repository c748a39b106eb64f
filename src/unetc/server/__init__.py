"""The server: bundles behind the APIs that people already call. Needs the extra `serve`."""
