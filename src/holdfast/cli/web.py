"""The command line of the pages: dashboard (a server to look at runs) and report (a file).

Arguments, the socket and printing; what is shown lives in holdfast.monitor. No torch.
"""

from __future__ import annotations

import argparse
import re
import socket
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holdfast.cli import common
from holdfast.errors import ConfigError, HoldfastError
from holdfast.formatting import format_bytes
from holdfast.i18n import N_, _, language
from holdfast.manage.rundir import look
from holdfast.table import printable

HOST, PORT = "127.0.0.1", 8765
_PORTS = [*range(PORT, PORT + 20), 0]  # tried one after the other; 0: any that is free


def run_dashboard(argv: Sequence[str], prog: str) -> int:
    """Run `holdfast dashboard`: serve until it is told to stop; 0 after Ctrl-C."""
    given = _dashboard_parser(prog).parse_args(argv)
    roots = [Path(each) for each in given.directories or [common.DIRECTORY]]
    _check_roots(roots)
    from holdfast.guarding import is_loopback, new_token
    from holdfast.listening import listen, shown_host
    from holdfast.monitor.web.app import create_app, guarded
    from holdfast.monitor.web.hub import Hub

    listener = listen(given.host, [given.port] if given.port is not None else _PORTS)
    port, token = int(listener.getsockname()[1]), new_token()
    address = f"http://{shown_host(given.host)}:{port}/?token={token}"
    app = guarded(
        create_app(Hub(roots), lang=given.lang),
        host=given.host,
        port=port,
        token=token,
        allowed_hosts=given.allowed_host,
        allowed_origins=given.allowed_origin,
    )
    if given.json:
        common.show_json({"url": address, "host": given.host, "port": port, "token": token})
    else:
        places = ", ".join(map(str, roots))
        common.show(
            [
                printable(_("Showing the runs under {places}. Open:", places=places)),
                f"  {address}",
                _("It only reads. Ctrl-C stops it; trainings go on."),
            ]
        )
    if not is_loopback(given.host):
        careful = _(
            "Careful: what goes over the network is not encrypted, the token neither. "
            "Safer: ssh -L {port}:127.0.0.1:{port} USER@HOST",
            port=port,
        )
        print(careful, file=sys.stderr)
    if given.open:
        webbrowser.open(address)
    _serve(app, listener)
    return 0


def run_report(argv: Sequence[str], prog: str) -> int:
    """Run `holdfast report`: 0."""
    parser = common.parser(
        prog,
        _(
            "Save a run as one HTML file: curves, checkpoints, samples, what happened, the end of "
            "the log. It needs no server and no network."
        ),
        _("Examples:\n  {prog} runs/a\n  {prog} runs/a --out a.html --lang zh", prog=prog),
    )
    parser.add_argument(
        "directory",
        nargs="?",
        default=common.DIRECTORY,
        metavar="RUN",
        help=_("run directory (default: {value})", value=common.DIRECTORY),
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help=_("where to write it (default: report-NAME.html, here)"),
    )
    given = parser.parse_args(argv)
    directory = Path(given.directory)
    look(directory, cached=True)  # says what is wrong with it
    from holdfast.monitor.web.report import write_report

    out = given.out or Path(f"report-{_file_name(directory)}.html")
    if out.is_dir():
        raise ConfigError("--out {path}: a directory; name a file", path=out)
    if not out.parent.is_dir():
        raise ConfigError(
            "--out {path}: there is no directory {directory}", path=out, directory=out.parent
        )
    size = write_report(directory, out, lang=language())
    if given.json:
        common.show_json({"file": str(out), "bytes": size})
    else:
        common.show(
            [
                printable(
                    _(
                        "Written: {path} ({size}). Open it in a browser.",
                        path=out,
                        size=format_bytes(size),
                    )
                )
            ]
        )
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "dashboard": (N_("show runs in a browser, live"), run_dashboard),
    "report": (N_("save a run as one HTML file"), run_report),
}


# ------------------------------------------------------------------------------------ arguments


def _dashboard_parser(prog: str) -> argparse.ArgumentParser:
    parser = common.parser(
        prog,
        _(
            "Show all runs under some directories in a browser: what is safe, live curves, "
            "checkpoints, comparison. It only reads, and only whoever has the printed address gets "
            "in."
        ),
        _(
            "Examples:\n  {prog}\n  {prog} runs other/runs --open\n"
            "  ssh -L 8765:127.0.0.1:8765 HOST   then, there: {prog} runs",
            prog=prog,
        ),
    )
    parser.add_argument(
        "directories",
        nargs="*",
        metavar="DIR",
        help=_(
            "run directories, or directories above them (default: {value})", value=common.DIRECTORY
        ),
    )
    parser.add_argument(
        "--port",
        type=int,
        metavar="N",
        help=_("port (default: {value}, or a free one where that is taken)", value=PORT),
    )
    parser.add_argument(
        "--host",
        default=HOST,
        metavar="ADDRESS",
        help=_("address to listen at (default: {value}, this machine alone)", value=HOST),
    )
    common.add_ways_in(parser)
    parser.add_argument("--open", action="store_true", help=_("open the browser"))
    return parser


def _check_roots(roots: Sequence[Path]) -> None:
    missing = [root for root in roots if not root.is_dir()]
    if missing:
        raise HoldfastError(
            "\n".join(
                _(
                    "There is no directory {directory}. Name directories with runs, or make it: a "
                    "training that starts in it will appear.",
                    directory=root,
                )
                for root in missing
            )
        )


def _file_name(directory: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", directory.resolve().name) or "run"


# ------------------------------------------------------------------------------------- the server


def _serve(app: Any, listener: socket.socket) -> None:
    import uvicorn

    from holdfast.listening import Connection

    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=1,
        lifespan="off",
        http=Connection,
        ws="none",
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # the way in which it is meant to end
        print(file=sys.stderr)
