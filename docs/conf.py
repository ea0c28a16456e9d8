"""Configuration of the documentation. Built by ``make docs``, without network."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from sb3_a3c import __version__

project = "sb3_a3c"
author = project_copyright = "The sb3_a3c developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # signatures of A2C's length are hard to read with types; `:param:` says what to pass
autodoc_member_order = "bysource"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"sb3_a3c {__version__}"
html_math_renderer = "mathml"


def visit_math(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write formulas as MathML, which browsers render without scripts of a CDN."""
    is_block = isinstance(node, nodes.math_block)
    mathml = tex2mathml(node.astext(), as_block=is_block)
    # on a phone, long formulas scroll
    translator.body.append(f'<div style="margin: 1em 0; overflow-x: auto">{mathml}</div>' if is_block else mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
