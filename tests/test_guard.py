"""Attacks on the app: names that are made to point here, other pages, other ports, other users, bad paths."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from entry_points import ROOT

import viz

pytest.importorskip('streamlit')
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from viewer.guard import Guard, redirect_page

GIVEN = 'app.example'  # --allow-host
PATHS = (
    '/', '/photos', '/media/0123.png', '/component/a.b/index.html', '/_stcore/metrics', '//', '/%2e%2e/',
    '/_stcore/host-config', '/_stcore/script-health-check', '/static/js/index.js', '/favicon.png', '/nothing',
)  # fmt: skip
UPLOAD = '/_stcore/upload_file/a/b'


@dataclass(frozen=True)
class Server:
    """The app as another process, and its log."""

    port: int
    token: str

    def ask(
        self, path: str = '/', *headers: str, method: str = 'GET', host: str | None = '', version: str = '1.1'
    ) -> tuple[int, str, bytes]:
        """Send a request as it is, and return status, head in lower case, and content; status 0 without an
        answer. host: None sends none, '' its own.
        """
        own = [] if host is None else [f'Host: {host or f"127.0.0.1:{self.port}"}']
        lines = [f'{method} {path} HTTP/{version}', *own, *headers]
        lines += [] if 'Upgrade: websocket' in headers else ['Connection: close']
        with socket.create_connection(('127.0.0.1', self.port), 10) as connection:
            connection.sendall('\r\n'.join([*lines, '', '']).encode())
            answer = b''
            while data := connection.recv(65536):
                answer += data
                if answer.startswith(b'HTTP/1.1 101'):
                    break
        head, _, content = answer.partition(b'\r\n\r\n')
        return int(head.split()[1]) if head else 0, head.decode().lower(), content

    def connect(self, *headers: str, path: str = '/_stcore/stream', host: str = '') -> int:
        """Ask for a WebSocket, and return the status: 101 opens it."""
        hand = ['Upgrade: websocket', 'Connection: Upgrade', 'Sec-WebSocket-Version: 13']
        return self.ask(path, *hand, 'Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==', *headers, host=host)[0]

    @property
    def cookie(self) -> str:
        return f'Cookie: viewer-token-{self.port}={self.token}'

    @property
    def origin(self) -> str:
        return f'Origin: http://127.0.0.1:{self.port}'


@pytest.fixture(scope='module')
def server(shapes, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp('guard')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    words = ['app', '--port', str(port), '--data', str(shapes), '--output', str(folder)]
    with (folder / 'log').open('w+') as log:
        command = [sys.executable, 'viz.py', *words, '--allow-host', GIVEN]
        app = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 60
            while not (found := re.search(r'token=(\S+)', (folder / 'log').read_text())):
                assert time.monotonic() < until and app.poll() is None, (folder / 'log').read_text()
                time.sleep(0.1)
            yield Server(port, found[1])
        finally:
            app.terminate()
            assert app.wait(20) == 0
        assert 'Traceback' not in (folder / 'log').read_text()


def test_the_address_opens_the_app(server):
    status, head, content = server.ask(f'/photos?photo=a%20b&token={server.token}&x=%22%3E')
    assert status == 200 and b'url=/photos?photo=a+b&amp;x=%22%3E"' in content
    name = f'viewer-token-{server.port}={server.token}'.lower()
    assert f'set-cookie: {name}; httponly; path=/; samesite=strict' in head
    assert 'referrer-policy: same-origin' in head and 'cache-control: no-store' in head
    for path in ('/', '/photos?photo=a', '/_stcore/health', '/_stcore/metrics'):
        assert server.ask(path, server.cookie)[0] == 200, path
    assert server.connect(server.cookie, server.origin) == 101
    status, _, content = server.ask(UPLOAD, server.cookie, server.origin, 'Content-Length: 0', method='PUT')
    assert status == 403 and b'XSRF' in content, 'past the guard, to what Streamlit asks for'


def test_the_address_leads_to_no_other_site(server):
    for path in ('//evil.example/', r'/\evil.example', '/%5Cevil.example', '//evil.example//'):
        content = server.ask(f'{path}?token={server.token}')[2]
        assert re.search(rb'url=/(%5C)?[a-z]', content), content


@pytest.mark.parametrize('path', PATHS)
def test_nothing_without_the_token(server, path):
    other = server.token.swapcase()
    wrong = [
        [], ['Cookie: viewer-token-1=' + server.token], [f'Cookie: {server.token}'], ['Cookie: =;;=;'],
        [server.cookie.replace(server.token, other)], [server.cookie[:-1]], [server.cookie + 'x'],
        [server.cookie.replace('viewer', 'Viewer')], [f'Authorization: token {server.token}'],
        [f'Referer: http://127.0.0.1:{server.port}/?token={server.token}'],
        ['Cookie: viewer-token-' + str(server.port) + '=é\x80'],
    ]  # fmt: skip
    for headers in wrong:
        status, head, content = server.ask(path, *headers)
        assert status == 403 and len(content) < 100 and 'set-cookie' not in head, headers
    for query in (
        'token=',
        f'token={other}',
        f'Token={server.token}',
        f'token={server.token}x',
        'token=%ff%00',
    ):
        assert server.ask(f'{path}?{query}')[0] == 403
    for method in ('HEAD', 'POST', 'PUT', 'DELETE', 'OPTIONS', 'PATCH', 'TRACE'):
        assert server.ask(path, server.origin, method=method)[0] == 403, method


def test_nothing_is_sent_without_the_token(server):
    assert server.connect(server.origin) == 403
    assert server.connect(server.origin, path=f'/_stcore/stream?token={server.token}') == 403
    for method in ('PUT', 'DELETE', 'OPTIONS', 'POST'):
        for path in (UPLOAD, f'{UPLOAD}?token={server.token}'):
            assert server.ask(path, server.origin, 'Content-Length: 0', method=method)[0] == 403


NAMES = (
    'evil.example', 'evil.example:{port}', 'localhost.evil.example', '127.0.0.1.evil.example', 'localhost.',
    'app.example.evil.example', 'evil.app.example', 'app.example:1', '0.0.0.0:{port}', '127.1', '2130706433',
    '[::]', '[::ffff:127.0.0.1]', '127.0.0.2', 'localhost:{port}@evil.example', 'evil@localhost',
    'localhost:x', 'localhost, evil.example', 'localhost/evil', 'http://localhost', ' ', None,
)  # fmt: skip


@pytest.mark.parametrize('name', NAMES)
def test_dns_rebinding(server, name):
    """A page whose name points to 127.0.0.1 has that name as its Host, and as its Origin."""
    host = name and name.format(port=server.port)
    cookies = [server.cookie, server.cookie.replace(str(server.port), '80')]
    for path in ('/', '/_stcore/health', '/media/0.png', f'/?token={server.token}'):
        status, _, content = server.ask(path, *cookies, host=host)
        assert status in (400, 403) and len(content) < 100, path
    if host is not None:
        assert server.connect(*cookies, f'Origin: http://{host}', host=host) in (400, 403)
        assert server.connect(*cookies, server.origin, host=host) in (400, 403)


def test_two_hosts_that_the_server_lets_through():
    """Uvicorn's h11 refuses them itself, others may not."""
    client = TestClient(Guard(PlainTextResponse('passed'), 'x'), 'http://localhost')
    cookie = ('Cookie', 'viewer-token-80=x')
    assert client.get('/', headers=[cookie, ('Host', 'localhost')]).text == 'passed'
    for hosts in (('localhost', 'evil.example'), ('evil.example', 'localhost'), ('localhost', 'localhost')):
        headers = [cookie, *(('Host', host) for host in hosts)]
        assert client.get('/', headers=headers).status_code == 403


def test_other_ways_to_name_a_host(server):
    evil = f'evil.example:{server.port}'
    assert server.ask('/', server.cookie, host=None, version='1.0')[0] in (400, 403)
    assert server.ask('/', server.cookie, version='1.0')[0] == 200
    for host in (f'127.0.0.1:{server.port}', evil):
        assert server.ask('/', server.cookie, f'Host: {evil}', host=host)[0] == 400
        assert server.ask('/', server.cookie, f'Host: 127.0.0.1:{server.port}', host=evil)[0] == 400
    for path in (f'http://{evil}/', f'http://127.0.0.1:{server.port}/', '*', 'photos', f'{evil}/'):
        assert server.ask(path, server.cookie)[0] in (400, 403), path
    forwarded = [f'X-Forwarded-Host: 127.0.0.1:{server.port}', f'Forwarded: host=127.0.0.1:{server.port}']
    forwarded += ['X-Forwarded-For: 127.0.0.1', 'X-Real-IP: 127.0.0.1', 'X-Original-Host: localhost']
    assert server.ask('/', server.cookie, *forwarded, host=evil)[0] == 403
    assert server.ask('/', *forwarded)[0] == 403
    assert server.connect(server.cookie, f'Origin: http://{evil}', *forwarded, host=evil) == 403


ORIGINS = (
    None, '', 'null', 'http://evil.example', 'http://127.0.0.1', 'http://127.0.0.1:1', 'http://localhost:1',
    'http://localhost:{port}', 'http://[::1]:{port}', 'http://127.0.0.1:{port}.evil.example', 'file://',
    'http://127.0.0.1:{port}/', 'http://evil.example@127.0.0.1:{port}', 'file://127.0.0.1:{port}',
    'http://127.0.0.1:{port}\r\nOrigin: http://evil.example', '127.0.0.1:{port}', 'http:127.0.0.1:{port}',
    'http://evil.example\r\nOrigin: http://127.0.0.1:{port}', 'chrome-extension://127.0.0.1:{port}',
    'http://127.0.0.1:{port} http://evil.example', 'https://app.example:1',
)  # fmt: skip


@pytest.mark.parametrize('origin', ORIGINS)
def test_pages_of_others(server, origin):
    """They have the cookie if they are on another port of this machine: a cookie is for all ports."""
    lines = [] if origin is None else [f'Origin: {origin.format(port=server.port)}']
    assert server.connect(server.cookie, *lines) in (400, 403)
    for method in ('PUT', 'DELETE', 'OPTIONS'):
        answer = server.ask(UPLOAD, server.cookie, *lines, 'Content-Length: 0', method=method)
        assert answer[0] == 403 and b'XSRF' not in answer[2]
    if origin is not None:
        for path in ('/', '/media/0.png', '/_stcore/metrics'):
            status, head, _ = server.ask(path, server.cookie, *lines)
            assert status == 403 and 'access-control' not in head


@pytest.mark.parametrize('site', ['same-site', 'cross-site', 'unknown'])
def test_embedded_by_others(server, site):
    for mode, dest in (
        ('no-cors', 'image'),
        ('navigate', 'iframe'),
        ('no-cors', 'script'),
        ('cors', 'empty'),
    ):
        how = [f'Sec-Fetch-Site: {site}', f'Sec-Fetch-Mode: {mode}', f'Sec-Fetch-Dest: {dest}']
        assert server.ask('/media/0.png', server.cookie, *how)[0] == 403
        assert server.ask(f'/?token={server.token}', *how)[0] == 403
    link = [f'Sec-Fetch-Site: {site}', 'Sec-Fetch-Mode: navigate', 'Sec-Fetch-Dest: document']
    assert server.ask(f'/?token={server.token}', *link)[0] == 200, 'a link to it may be followed'
    assert server.ask(UPLOAD, server.cookie, server.origin, *link, method='PUT')[0] == 403
    head = server.ask('/', server.cookie)[1]
    assert "frame-ancestors 'self'" in head and 'resource-policy: same-origin' in head


def test_cookies_that_others_add(server):
    """A page on another port may set a cookie of this name, for a path, which then comes first."""
    added = f'Cookie: viewer-token-{server.port}=x; a=b; '
    assert server.ask('/photos', added + server.cookie.removeprefix('Cookie: '))[0] == 200
    assert server.ask('/photos', added.rstrip('; '), server.cookie)[0] == 200
    assert server.ask('/photos', added.rstrip('; '))[0] == 403


def test_a_tunnel_has_another_port(server):
    """As with ssh -L 9000:127.0.0.1:8501, and [::1] or localhost on its near side."""
    for host in ('localhost:9000', '[::1]:9000', 'LocalHost:9000', 'localhost', '[::1]'):
        port = host.rpartition(':')[2] if '9' in host else '80'
        assert f'viewer-token-{port}=' in server.ask(f'/?token={server.token}', host=host)[1]
        cookie = server.cookie.replace(str(server.port), port)
        assert server.ask('/', cookie, host=host)[0] == 200
        assert server.connect(cookie, f'Origin: http://{host.lower()}', host=host) == 101
        assert server.connect(cookie, server.origin, host=host) == 403


def test_a_proxy_of_a_given_name(server):
    """Some proxies keep the Host of the browser, some put that of the app there."""
    cookie = server.cookie.replace(str(server.port), '80')
    assert server.connect(cookie, f'Origin: https://{GIVEN}', host=GIVEN) == 101
    assert server.connect(server.cookie, f'Origin: https://{GIVEN}') == 101
    assert server.connect(server.cookie, f'Origin: https://{GIVEN}:444') == 403
    assert server.connect(f'Origin: https://{GIVEN}', host=GIVEN) == 403


def test_health_is_open_and_says_nothing(server):
    for method in ('GET', 'HEAD'):
        status, head, content = server.ask('/_stcore/health', method=method)
        assert (status, content) == (200, b'ok' if method == 'GET' else b'') and 'set-cookie' not in head


def test_it_answers_to_this_machine_alone_and_serves_no_file(server):
    if Path('/proc/net/tcp').exists():
        assert listening(server.port) == {'0100007F'}, 'on 127.0.0.1 alone'
    for path in (
        '/etc/passwd', '/../../../../etc/passwd', '/%2e%2e/%2e%2e/%2e%2e/etc/passwd', '/viewer/app.py',
        '/static/../../viewer/app.py', '/app/static/viewer/app.py', '/media/../viewer/app.py',
        '/media/%2e%2e%2fviewer/app.py', '//etc/passwd', '/component/x/../../../../etc/passwd',
    ):  # fmt: skip
        content = server.ask(path, server.cookie)[2]
        assert b'root:' not in content and b'import' not in content.split(b'<')[0], path


def test_the_token_is_in_no_argument(server):
    """Every user of a machine sees the arguments of its processes."""
    if not Path('/proc/self/cmdline').exists():
        pytest.skip('no /proc here')
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            assert server.token.encode() not in path.read_bytes(), path
        except OSError:
            continue  # it has ended, or is another user's


def test_the_page_that_opens_the_browser_is_private(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    with redirect_page('http://127.0.0.1:1/?token=a&b') as page:
        assert page.stat().st_mode & 0o777 == 0o600 and page.parent == tmp_path
        assert 'url=http://127.0.0.1:1/?token=a&amp;b"' in page.read_text()
    assert not page.exists()


@pytest.mark.parametrize('name', ['*', 'http://a', 'a/b', '', 'a b', 'a:b', '.*', 'é', '[::1'])
def test_bad_names_of_hosts(name, capsys):
    with pytest.raises(SystemExit, match='2'):
        viz.command(['app', '--allow-host', name])
    assert 'expected NAME or NAME:PORT' in capsys.readouterr().err


def listening(port: int) -> set[str]:
    """Return the addresses, in hex, that sockets of this port listen on."""
    rows = [line.split() for name in ('tcp', 'tcp6') for line in socket_table(name)]
    sockets = [row[1].split(':') for row in rows if row[3] == '0A']
    return {address for address, number in sockets if int(number, 16) == port}


def socket_table(name: str) -> list[str]:
    """Return the rows of /proc/net/tcp or tcp6."""
    path = Path('/proc/net') / name
    return path.read_text().splitlines()[1:] if path.exists() else []
