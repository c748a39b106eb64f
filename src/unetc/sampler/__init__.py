"""Schedulers as data: tables of coefficients, the step that they define, and the noise that a step adds.

A session needs only numpy to use them. `unetc.compiler.schedulers` reads the tables from a diffusers scheduler.
"""
