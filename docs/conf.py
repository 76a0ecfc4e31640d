"""How Sphinx builds the site: ``python -m sphinx -W docs docs/_build``."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from docutils.nodes import literal, reference, title
from sphinx.addnodes import pending_xref
from sphinx.domains.python import PyXRefRole
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.logging import getLogger

if TYPE_CHECKING:
    from docutils.nodes import Element, document
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

_NAMES = (
    "aiosync",
    "aiosync.recipes",
    "aiosync.redis",
    "aiosync.debug",
    "aiosync.opentelemetry",
)
PACKAGES = [import_module(name) for name in _NAMES]
PUBLIC = {name: f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__}

logger = getLogger(__name__)

project = "aiosync"
author = "the aiosync authors"
copyright = author
release = metadata.version("aiosync")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# Each page is plain Markdown, so that it reads well without a build too.
myst_enable_extensions: list[str] = []
myst_heading_anchors = 3

default_role = "name"
nitpicky = True
# Names of others, which are no links since a build must not need the network; and private ones, in
# annotations.
nitpick_ignore_regex = [(r"py:.*", r"(?!aiosync\b).*|aiosync(\.\w+)*\._.*")]

autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 110
python_display_short_literal_types = True
add_module_names = False
toc_object_entries_show_parents = "hide"

pygments_dark_style = "monokai"
html_theme = "furo"
html_title = "aiosync"
html_static_path = ["_static"]
html_css_files = ["aiosync.css"]
html_show_copyright = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp"


class NameRole(PyXRefRole):
    """`name`: a link if it is the name of something in the API reference, otherwise just code."""

    def process_link(self, *args: Any) -> tuple[str, str]:
        refnode: Element = args[1]
        refnode["refdomain"], refnode["reftype"] = "py", "obj"
        refnode["may_be_code"] = True
        return super().process_link(*args)


def link_names(app: Sphinx, doctree: document) -> None:
    """Make links of the public names in Markdown, which has no roles."""
    if app.env.doc2path(app.env.docname).suffix != ".md":
        return
    for node in list(doctree.findall(literal)):
        name, _, member = node.astext().removesuffix("()").partition(".")
        if name in PUBLIC and not isinstance(node.parent, (pending_xref, reference, title)):
            target = f"{PUBLIC[name]}.{member}".removesuffix(".")
            link = pending_xref(refdomain="py", reftype="obj", reftarget=target, may_be_code=True)
            link["refdoc"] = app.env.docname
            node.replace_self(link)
            link += node


def resolve_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element
) -> Element | None:
    """Find a public name from elsewhere than its module. Other names are left as code."""
    if not node.get("may_be_code"):
        return None
    name, _, member = node["reftarget"].partition(".")
    if name not in PUBLIC:
        return contnode
    target = f"{PUBLIC[name]}.{member}".removesuffix(".")
    python = env.domains.python_domain
    found = python.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)
    if found is None:
        logger.warning("%s is not in the API reference", target, location=node)
    return found


def tell_parameters_apart(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Make code of the names of parameters, which would else be links to methods of that name."""
    if what not in {"class", "function", "method"}:
        return
    try:
        parameters = inspect.signature(obj).parameters
    except (TypeError, ValueError):
        return
    pattern = re.compile(rf"(?<![`\w])`({'|'.join(map(re.escape, parameters))})`(?!`)")
    if parameters:
        lines[:] = [pattern.sub(r"``\1``", line) for line in lines]


def leave_out_modules(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Cut the docstring of a package before its list of modules, which is for contributors."""
    if what == "module":
        found = [at for at, line in enumerate(lines) if re.match(r"_\w+ {2,}", line)]
        del lines[found[0] if found else len(lines) :]


def find_sources() -> None:
    """Undo ``__module__``, which names the public package, so that autodoc finds the sources."""
    modules = [module for name, module in sys.modules.items() if name.startswith("aiosync.")]
    for name, public_name in PUBLIC.items():
        found = getattr(import_module(public_name.removesuffix(f".{name}")), name)
        definition = re.compile(rf"^(class|def|async def) {name}\b", re.MULTILINE)
        for module in modules:
            if getattr(module, name, None) is found and definition.search(
                inspect.getsource(module)
            ):
                found.__module__ = module.__name__
    # The signature with all options, not the overloads for type checkers.
    analyzer = ModuleAnalyzer.for_module("aiosync._pool._pool")
    analyzer.analyze()
    analyzer.overloads.pop("ConnectionPool.__init__")


def setup(app: Sphinx) -> None:
    find_sources()
    app.add_role("name", NameRole())
    app.connect("doctree-read", link_names)
    app.connect("missing-reference", resolve_name)
    app.connect("autodoc-process-docstring", tell_parameters_apart)
    app.connect("autodoc-process-docstring", leave_out_modules)
