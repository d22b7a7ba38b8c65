"""The site: `make docs`. Needs no network, to build or to be read."""

import contextlib
import io
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

from config_reference import config_reference  # noqa: E402

import mpq_jax  # noqa: E402

project = "mpq_jax"
author = "the authors of mpq_jax"
release = version = mpq_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "plain_docstrings"]
exclude_patterns = ["_build", "_generated", "jupyter_execute", "**.ipynb_checkpoints"]

html_theme = "furo"
html_title = "mpq_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_show_copyright = False
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # the slugs are GitHub's: links with #… work there and here
smartquotes = False  # -- and quotes in text are code more often than not
copybutton_exclude = ".linenos, .gp, .go"

# `make docs` runs the notebook and shows what came out; the test of the site does not (the notebook has its own).
nb_execution_mode = "force" if os.environ.get("MPQ_DOCS_RUN") else "off"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# Every reference to something of ours must be there; other projects' are not linked: that would need the network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jnp|np|numpy|optax|flax|linen|nnx|collections|typing|pathlib|export|argparse|orbax|qwix)(\..*)?"),
    ("py:.*", r"(Any|Callable|Collection|Iterable|Iterator|Mapping|Sequence|Path|Literal|optional|TypeAlias)"),
]

COMMANDS = {"train": "mpq_jax.commands.train", "search": "mpq_jax.commands.search", "export": "mpq_jax.commands.export"}


def generate(app, config) -> None:
    """What is never copied by hand: what each command's --help says, and every setting with its default."""
    folder = HERE / "_generated"
    folder.mkdir(exist_ok=True)
    os.environ["COLUMNS"] = "100"
    for name, module in {**COMMANDS, "latency": "mpq_jax.latency"}.items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            __import__(module, fromlist=["main"]).main(["--help"])
        (folder / f"{name}.txt").write_text(out.getvalue())
    (folder / "config.md").write_text(config_reference((HERE.parent / "mpq_jax" / "config.py").read_text()))


def setup(app) -> None:
    app.connect("config-inited", generate)
