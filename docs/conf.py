"""The documentation site: `make docs` builds it from the pages of this folder, and warnings are errors."""

project = "unetc"
author = "the unetc authors"
copyright = "the unetc authors, Apache-2.0"

extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "unetc"
html_copy_source = False
html_show_sphinx = False
