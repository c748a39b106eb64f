"""Distances between the images of two models at the same noise, and task metrics of reference models."""
