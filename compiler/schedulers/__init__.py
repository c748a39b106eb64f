"""Schedulers of diffusers: the classes and keys that unetc knows, and the tables that it reads from them."""
