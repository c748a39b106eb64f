"""Inputs and call of each class of denoiser."""
