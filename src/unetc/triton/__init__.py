"""Bundles in NVIDIA's Triton Inference Server: the repository of models, and the loop that runs inside of it."""
