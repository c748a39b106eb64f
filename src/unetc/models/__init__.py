"""Pretrained models: built-in ones, diffusers folders, Hub models and OpenAI's GLIDE."""
