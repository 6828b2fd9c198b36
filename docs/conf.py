"""Settings of Sphinx, which renders this folder: `make docs`."""

import flexsparse

project = "flexsparse"
copyright = "the flexsparse authors"
version = release = flexsparse.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3
default_role = "py:obj"  # docstrings name code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]  # tables have room
html_title = f"flexsparse {release}"
html_copy_source = False
html_show_sourcelink = False
