"""The dashboard: a FastAPI application that shows runs and changes nothing.

Every answer stands behind the guard (a token, our own names). Runs are asked for by an id, never by
a path. The page's script for plots is plotly's own, from the installed package.
"""

from __future__ import annotations

import asyncio
import html
import json
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Query
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import HTMLResponse, Response

from holdfast.guarding import (
    FOREIGN_HOST,
    FOREIGN_ORIGIN,
    STATUS,
    Answer,
    App,
    Guard,
    Hosts,
    Origins,
    Refused,
)
from holdfast.monitor.web import data as web_data
from holdfast.monitor.web.files import SCRIPTS, TYPES, WEB, plotting_script
from holdfast.monitor.web.hub import Feed, Hub

COMPARED = 8  # runs at once: as many as there are colours
_SAID = {  # in both languages: a request that is refused has shown nothing yet by which to tell
    401: (
        "This page belongs to the person who started it. Open the address that "
        "`holdfast dashboard` printed in the terminal; it ends with a token, which is a new one "
        "after every start.",
        "请打开终端里 holdfast dashboard 打印出的网址。网址末尾带有令牌，每次启动都会更换。",
    ),
    FOREIGN_ORIGIN: (
        "This request comes from a page of another origin. Behind a proxy, start the dashboard "
        "with --allowed-origin https://NAME.",
        "这个请求来自另一个来源的网页。若经由代理访问，请在启动时加上 --allowed-origin https://名称。",
    ),
    FOREIGN_HOST: (
        "This is not a name that the dashboard answers to. Behind a proxy or from a container, "
        "start it with --allowed-host NAME.",
        "仪表板不认得这个主机名。若经由代理或从容器访问，请在启动时加上 --allowed-host 名称。",
    ),
}


def create_app(hub: Hub, *, lang: str | None = None) -> FastAPI:
    """Return the application over `hub`, for requests that `guarded` has let in.

    `lang` is the language of the page where its reader has chosen none.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GZipMiddleware, compresslevel=6)
    _add_page(app, lang)
    _add_data(app, hub)
    return app


def guarded(
    app: App,
    *,
    host: str,
    port: int,
    token: str,
    allowed_hosts: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
) -> Guard:
    """Return `app` for requests with the token.

    The cookie bears the port: all ports of one machine share their cookies, and two dashboards must
    not turn each other out.
    """
    return Guard(
        app,
        hosts=Hosts(host, allowed_hosts),
        origins=Origins(allowed_origins),
        secret=token,
        refusal=refusal,
        cookie=f"holdfast-{port}",
    )


def refusal(refused: Refused) -> Answer:
    """Return the page that says why a request was refused."""
    status = STATUS[refused.reason]
    said = _SAID.get(refused.reason, _SAID[401])
    title = f"{status} {HTTPStatus(status).phrase}"
    text = "".join(f"<p>{html.escape(each)}</p>" for each in said)
    body = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><h1>{title}</h1>{text}"
    )
    return status, {"content-type": "text/html; charset=utf-8"}, body.encode()


# ------------------------------------------------------------------------------------- the page


def _add_page(app: FastAPI, lang: str | None) -> None:
    @app.get("/")
    def page() -> HTMLResponse:
        text = (WEB / "index.html").read_text("utf-8")
        scripts = "".join(f'<script defer src="static/{name}"></script>\n' for name in SCRIPTS)
        filled = {"LANG": lang or "", "PLOTLY": plotting_script()[0], "SCRIPTS": scripts}
        for name, value in filled.items():
            text = text.replace(f"@{name}@", value)
        return HTMLResponse(text)

    @app.get("/static/plotly-{version}.js")
    def plotly(version: str) -> Response:
        if version != plotting_script()[0]:
            raise HTTPException(404)
        headers = {"cache-control": "private, max-age=31536000, immutable"}
        return Response(plotting_script()[1], media_type=TYPES[".js"], headers=headers)

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        known = {p.name: p for p in WEB.iterdir() if p.suffix in TYPES}
        if name not in known:
            raise HTTPException(404)
        # Asked for anew each time: a newer version of the package must not meet old scripts.
        headers = {"cache-control": "no-cache"}
        return Response(
            known[name].read_bytes(), media_type=TYPES[known[name].suffix], headers=headers
        )


# ------------------------------------------------------------------------------------- the data


def _add_data(app: FastAPI, hub: Hub) -> None:
    @app.get("/api/runs")
    async def runs() -> Response:
        await hub.fresh()
        now = round(time.time() * 1000)
        return _json({"runs": hub.rows(), "problems": hub.problems(), "now": now})

    @app.get("/api/runs/{identity}")
    async def run(identity: str, have: str = "") -> Response:
        picture = (await _feed(hub, identity)).picture
        if picture is None:
            raise HTTPException(503, "not read yet")
        return _json(await asyncio.to_thread(picture.news, have))

    @app.get("/api/runs/{identity}/log")
    async def log(identity: str) -> Response:
        feed = await _feed(hub, identity)
        return _json(await hub.read([feed], web_data.log_tail, feed.directory))

    @app.get("/api/compare")
    async def compare(run: list[str] = Query(default=[])) -> Response:  # noqa: B008 - FastAPI's way
        await hub.fresh()
        feeds = hub.chosen(run[:COMPARED])
        asked = [(feed.id, feed.name, feed.directory) for feed in feeds]
        return _json(await hub.read(feeds, web_data.comparison, asked))


async def _feed(hub: Hub, identity: str) -> Feed:
    await hub.fresh()
    found = hub.chosen([identity])
    if not found:
        raise HTTPException(404, "no such run")
    return found[0]


def _json(data: Any) -> Response:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text, media_type="application/json")
