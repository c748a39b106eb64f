"""Distances between the images of two models that start from the same noise."""
