"""The files that a page is made of: ours beside this module, and plotly's from its package."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

WEB = Path(__file__).parent / "static"
# In the order in which they must run; theme.js stands before them all, in the head.
SCRIPTS = ("strings.js", "base.js", "charts.js", "overview.js", "sections.js", "app.js")
_SCRIPT = "text/javascript; charset=utf-8"
TYPES = {".js": _SCRIPT, ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}


@lru_cache(maxsize=1)
def plotting_script() -> tuple[str, bytes]:
    """Return version and bytes of Plotly's script in the installed package."""
    import plotly

    path = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    return str(plotly.__version__), path.read_bytes()
