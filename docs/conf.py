"""How the site is built: `make docs`."""

import os
from importlib.metadata import version as installed_version
from pathlib import Path

project = "compress-core"
author = "the authors of compress-core"
project_copyright = "the authors of compress-core"
version = release = installed_version("compress-core")

extensions = ["myst_nb"]
exclude_patterns = ["README.md"]

# Markdown as GitHub reads it: the same anchors of headings, so that each link works in both places.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nitpicky = True

# The tutorials run while the site is built; what has not changed comes from the cache beside the pages.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parents[1] / "build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # by default two scripts from elsewhere; no page has a widget
os.environ["OMP_NUM_THREADS"] = "1"  # the networks are too small for more threads
os.environ["COMPRESS_QUANTIZATION_KERNELS"] = "eager"  # compiling kernels takes longer than what they save here

html_theme = "furo"
html_title = "compress-core"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
