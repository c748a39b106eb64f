"""The report of a bundle: one self-contained HTML page, and the pictures of samples it shares with `unetc sample`.

`pictures` needs numpy and pillow only; the rest needs matplotlib and jinja2 as well, so nothing is imported
here.
"""
