"""The report of a bundle: a self-contained HTML page, and the pictures of samples that `unetc sample` writes too.

`pictures` needs only numpy and pillow. The other modules also need matplotlib and jinja2, so nothing is imported here.
"""
