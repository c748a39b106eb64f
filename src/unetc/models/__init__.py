"""Pretrained models: those that ship with unetc, folders of diffusers, the Hub, and OpenAI's GLIDE."""
