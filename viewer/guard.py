"""Serve the browser app to whoever has the token that viz.py app prints, and to nobody else.

Streamlit takes any Host, so that a page whose name is made to point here (DNS rebinding) could read the app,
and so could every user of this machine. The guard stands in front of all that Streamlit serves, and lets a
request in if
1. its one Host is a name of this machine, at any port, since `ssh -L` may change it, or one of --allow-host,
2. its Origin, which a WebSocket and an upload must have, is the page's own,
3. the browser does not say that another site, or another port, asks for it, unless a link was followed,
4. it has the cookie. The address with the token sets it; so bookmarks of inner pages work.
docs/app.md has what was tried against it.
"""

import ctypes
import html
import re
import secrets
import sys
import threading
import webbrowser
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import parse_qsl, quote, urlencode

import streamlit as st
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

APP = Path(__file__).with_name('app.py')
M_ARENA_MAX = -8  # of glibc's malloc.h
LOOPBACK = re.compile(r'(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?', re.ASCII)
HEALTH = '/_stcore/health'  # probes get a bare ok without a token
READING = ('GET', 'HEAD')
FORBIDDEN = 'This app opens at the address that viz.py app printed, with its token.'
PRIVATE = {'Cache-Control': 'no-store', 'Referrer-Policy': 'same-origin'}
ISOLATED = [
    (b'cross-origin-resource-policy', b'same-origin'),
    (b'content-security-policy', b"frame-ancestors 'self'"),
]


def serve(words: Sequence[str], port: int, hosts: Sequence[str], options: Mapping, browse: bool) -> None:
    """Serve viewer/app.py, called with these words, on 127.0.0.1 until a signal ends it.

    hosts: more names under which a browser may reach it, NAME or NAME:PORT; options: Streamlit's own; browse:
    open it in the browser.
    """
    token = secrets.token_urlsafe(32)
    address = f'http://127.0.0.1:{port}/?token={token}'

    @asynccontextmanager
    async def announce(app: st.App) -> AsyncGenerator[None]:
        print(f'{address}  (Ctrl-C ends it)', flush=True)
        with redirect_page(address) if browse else nullcontext() as page:
            if page is not None:
                threading.Thread(target=webbrowser.open, args=(page.as_uri(),), daemon=True).start()
            yield

    own = {
        'server.address': '127.0.0.1',
        'server.port': port,
        'server.corsAllowedOrigins': [f'{scheme}://{host}' for host in hosts for scheme in ('http', 'https')],
        'logger.hideWelcomeMessage': True,  # its address lacks the token
    }
    sys.argv[1:] = words
    share_pools()
    app = st.App(APP, middleware=[Middleware(Guard, token=token, hosts=hosts)], lifespan=announce)
    with suppress(KeyboardInterrupt):
        app.run(config={**options, **own})


def share_pools() -> None:
    """Let all threads take memory from two pools of glibc's. Each has its own otherwise, and keeps there what
    is free: 20 sessions with a photo of 4000x4000 each took 2.8 GB at most, and so they take 1.6 GB.
    """
    with suppress(AttributeError, OSError, TypeError):  # where there is no glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


@contextmanager
def redirect_page(address: str) -> Generator[Path]:
    """Write a page that leads to an address: all users see the arguments of a browser, but not this file.

    It is in the home folder, since a browser from a snap sees no other.
    """
    with NamedTemporaryFile('w', prefix='viz-app-', suffix='.html', dir=Path.home()) as file:
        file.write(refresh(address))
        file.flush()
        yield Path(file.name)


def refresh(address: str) -> str:
    return f'<meta http-equiv="refresh" content="0; url={html.escape(address)}">'


class Guard:
    """Wrap an ASGI app: refuse a request that is not of the browser that has the token."""

    def __init__(self, app: ASGIApp, token: str, hosts: Sequence[str] = ()) -> None:
        self.app, self.token, self.hosts = app, token, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] == 'lifespan':
            await self.app(scope, receive, send)
            return
        headers, method = Headers(scope=scope), scope.get('method', 'WebSocket')
        if not self.is_addressed(scope, headers):
            answer = PlainTextResponse('This app answers to localhost and --allow-host alone.', 403)
        elif method in READING and scope['path'] == HEALTH and not self.has_cookie(headers):
            answer = PlainTextResponse('ok')
        elif not self.is_own(headers, method in READING):
            answer = PlainTextResponse('This app answers to its own pages alone.', 403)
        elif method in READING and self.has_token(scope):
            answer = self.welcome(scope, headers)
        elif self.has_cookie(headers):
            await self.app(scope, receive, isolated(send))
            return
        else:
            answer = PlainTextResponse(FORBIDDEN, 403, PRIVATE)
        if scope['type'] == 'websocket':
            await send({'type': 'websocket.close', 'code': 1008})  # before it is accepted: HTTP status 403
        else:
            await answer(scope, receive, send)

    def is_addressed(self, scope: Scope, headers: Headers) -> bool:
        """Tell whether a request is for this app: one Host, which is known, and a path."""
        hosts = headers.getlist('host')
        if len(hosts) != 1 or not scope['path'].startswith('/'):
            return False
        host = hosts[0].lower()
        return LOOPBACK.fullmatch(host) is not None or host in self.hosts

    def is_own(self, headers: Headers, reading: bool) -> bool:
        """Tell whether a page of this app asks, or a person, by a link, a bookmark or the address bar.

        A cookie goes to all ports of a host, so that it alone does not say so.
        """
        asks = headers.get('sec-fetch-site', 'none')
        how = headers.get('sec-fetch-mode'), headers.get('sec-fetch-dest')
        if asks not in ('none', 'same-origin') and not (reading and how == ('navigate', 'document')):
            return False
        origins = headers.getlist('origin')
        if not origins:
            return reading
        scheme, _, host = origins[0].lower().partition('://')
        is_page = host == headers['host'].lower() or host in self.hosts
        return len(origins) == 1 and scheme in ('http', 'https') and is_page

    def has_token(self, scope: Scope) -> bool:
        return any(self.is_token(value) for key, value in query_of(scope) if key == 'token')

    def has_cookie(self, headers: Headers) -> bool:
        """Look at all cookies of the name: a page on another port may have added one."""
        name = cookie_name(headers)
        pairs = [pair.strip().partition('=') for pair in ';'.join(headers.getlist('cookie')).split(';')]
        return any(key == name and self.is_token(value) for key, _, value in pairs)

    def is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(errors='replace'), self.token.encode())

    def welcome(self, scope: Scope, headers: Headers) -> HTMLResponse:
        """Set the cookie, and lead to the same address without the token.

        No redirect does: after a link on another site the browser would keep the strict cookie back.
        """
        rest = [(key, value) for key, value in query_of(scope) if key != 'token']
        path = '/' + quote(scope['path'].lstrip('/\\')) + (f'?{urlencode(rest)}' if rest else '')
        answer = HTMLResponse(refresh(path), headers=PRIVATE)
        answer.set_cookie(cookie_name(headers), self.token, httponly=True, samesite='strict')
        return answer


def query_of(scope: Scope) -> list[tuple[str, str]]:
    return parse_qsl(scope['query_string'].decode('latin-1'), keep_blank_values=True)


def cookie_name(headers: Headers) -> str:
    """Return a name for each port that the browser sees, since the cookies of a host go to all its ports."""
    port = headers['host'].rpartition(':')[2]
    return f'viewer-token-{port if port.isascii() and port.isdigit() else 80}'


def isolated(send: Send) -> Send:
    """Add headers to each response that keep it out of the pages of others."""

    async def send_isolated(message: Message) -> None:
        if message['type'] == 'http.response.start':
            message = {**message, 'headers': [*message['headers'], *ISOLATED]}
        await send(message)

    return send_isolated
