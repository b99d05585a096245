"""How the documentation is built: `python -m sphinx -W --keep-going -b html docs build/docs`.

Nothing is fetched: formulas become MathML, and the pages use neither fonts nor scripts of others.
"""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

import music_jax  # noqa: E402

project = "music_jax"
author = "the authors of music_jax"
version = release = music_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "from_code",
    "mathml",
    "offline",
]
exclude_patterns = ["extensions", "figures"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autoclass_content = "both"  # the docstring of __init__ documents the arguments
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Reference"]
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False  # the signature has the types
add_module_names = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
default_role = "literal"  # docstrings write code in single backticks
html_math_renderer = "mathml"

# References are checked, but those to other libraries have no target without the network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|etils|flax|jax|ml_collections|numpy|optax|os)\..*"),
    ("py:class", "ArrayTree"),  # of jax.typing
]

html_theme = "furo"
html_title = f"music_jax {version}"
html_static_path = ["static"]
html_css_files = ["music_jax.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}


def _skip_field(app, what, name, thing, skip, options):
    """Skips the generated docstrings of NamedTuple fields, which the class docstring documents."""
    generated = (getattr(thing, "__doc__", None) or "").startswith("Alias for field number")
    return True if generated else None


def _remove_generated_text(app, what, name, thing, options, lines):
    """Removes the generated docstring of a NamedTuple's constructor."""
    lines[:] = [line for line in lines if not line.startswith("Create new instance of ")]


def _link_to_including_page(app, page, source):
    """Links to the page that includes launch/README.md, where the text links to that file."""
    source[0] = re.sub(r"\]\((\.\./)+launch/README\.md#", "](clusters.md#", source[0])


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", _link_to_including_page)
    app.connect("autodoc-skip-member", _skip_field)
    app.connect("autodoc-process-docstring", _remove_generated_text)
