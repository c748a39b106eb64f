"""A scheduler as data: tables of coefficients, the step they describe, and the noise that steps add.

numpy only: a session needs nothing else. `unetc.compiler.scheduler` reads the tables from a diffusers scheduler.
"""
