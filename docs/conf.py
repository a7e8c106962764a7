"""Settings of the site: `python -m sphinx -W docs docs/_build/html`."""

import logging
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate  # noqa: E402
import ncvsd_inverse  # noqa: E402

project = "ncvsd-inverse"
author = "The ncvsd-inverse team"
copyright = author
release = version = ncvsd_inverse.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "generated/*.inc.md", "examples"]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}

# Single backticks in docstrings are code.
default_role = "code"

html_theme = "furo"
html_title = "ncvsd-inverse"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_enable_extensions = ["dollarmath"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes"), ("Sources", "notes")]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("matplotlib", generate.scrape_last_figure),
    "capture_repr": (),
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "abort_on_example_error": True,
    "reset_modules": ("matplotlib", generate.reset_machine),
    "plot_gallery": True,
    "min_reported_time": 1e9,
    "write_computation_times": False,
}
# Functions as settings cannot be pickled; pages do not depend on them.
suppress_warnings = ["config.cache"]
logging.getLogger("matplotlib").setLevel(logging.WARNING)


def setup(app: object) -> None:
    """Write the pages that are made of code, cards and records; make docstrings plain text."""
    app.connect("builder-inited", lambda app: generate.write_pages(Path(app.srcdir) / "generated"))
    app.connect("autodoc-process-docstring", generate.as_restructured_text, priority=100)
    app.connect("autodoc-process-docstring", generate.with_colons, priority=900)
