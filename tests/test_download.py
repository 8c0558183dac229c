"""Downloads from a hostile server: each fault is a photo's own, within limits of bytes, time and memory."""

import csv
import gzip
import io
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from entry_points import ROOT
from PIL import Image
from test_taco import photo_bytes, write_annotations

import prepare
from data import download
from data.download import Deadline, Downloads, Missing, is_public

HEAD = b'HTTP/1.1 200 OK\r\n'
Connection = socket.socket


def answer(head: bytes, body: bytes = b'', length: bool = True) -> Callable[[Connection], None]:
    """Answer with a status line and headers, and a body."""
    lines = head + (b'Content-Length: %d\r\n' % len(body) if length else b'')
    return lambda one: one.sendall(lines + b'\r\n' + body)


def endlessly(head: bytes, part: bytes, pause: float = 0) -> Callable[[Connection], None]:
    """Answer with a head, and parts without end."""

    def write(one: Connection) -> None:
        one.sendall(head)
        while True:
            one.sendall(part)
            time.sleep(pause)

    return write


def moved(location: bytes, body: bytes = b'') -> Callable[[Connection], None]:
    return answer(b'HTTP/1.1 302 Found\r\nLocation: %s\r\n' % location, body)


PART = bytes(1 << 16)
ZEROS = gzip.compress(bytes(20 << 20))
PAGES: dict[str, Callable[[Connection], None]] = {
    'bomb': answer(HEAD + b'Content-Encoding: gzip\r\n', ZEROS),
    'bomb in a bomb': answer(HEAD + b'Content-Encoding: gzip, gzip\r\n', gzip.compress(ZEROS)),
    'endless body': endlessly(HEAD + b'\r\n', PART),
    'endless chunks': endlessly(HEAD + b'Transfer-Encoding: chunked\r\n\r\n', b'10000\r\n' + PART + b'\r\n'),
    'endless body of a redirect': endlessly(b'HTTP/1.1 302 Found\r\nLocation: /no\r\n\r\n', PART),
    'endless body of a fault': endlessly(b'HTTP/1.1 503 Busy\r\n\r\n', PART),
    'a byte now and then': endlessly(HEAD + b'Content-Length: 99999\r\n\r\n', b'x', 0.05),
    'a byte of a header now and then': endlessly(HEAD + b'X: ', b'x', 0.05),
    'a byte of a chunk now and then': endlessly(HEAD + b'Transfer-Encoding: chunked\r\n\r\n', b'0', 0.05),
    'nothing': lambda one: time.sleep(5),
    'no HTTP': lambda one: one.sendall(b'\x1b[2J\r\n\r\n'),
    'a circle': moved(b'/a%20circle'),
    'no address': moved(b'http://[::zz/'),
    'no port': moved(b'http://127.0.0.1:999999/'),
    'a file': moved(b'file:///etc/passwd'),
    'this machine': moved(b'http://localhost:1/'),
    'this network': moved(b'http://10.0.0.1/'),
    'NUL': moved(b'http://a\0b/'),
    'a name without end': moved(b'http://' + b'a' * 300 + b'/'),
    'another encoding': answer(HEAD + b'Content-Encoding: gzip\r\n', b'no gzip'),
    'many headers': answer(HEAD + b''.join(b'X-%d: 1\r\n' % n for n in range(1000))),
}
REASONS = {
    'bomb': 'is larger than 1 MB',
    'bomb in a bomb': 'is larger than 1 MB',
    'endless body': 'is larger than 1 MB',
    'endless chunks': 'is larger than 1 MB',
    'endless body of a redirect': 'the server answers 404 Not Found',
    'endless body of a fault': 'the server answers 503 Service Unavailable',
    'a byte now and then': 'took more than',
    'a byte of a header now and then': 'took more than',
    'a byte of a chunk now and then': 'took more than',
    'nothing': 'timed out',
    'no HTTP': 'Connection aborted',
    'a circle': 'is redirected more than 5 times',
    'no address': 'Invalid IPv6 URL',
    'no port': '999999',
    'a file': "leads to 'file:///etc/passwd', expected http(s)://",
    'this machine': 'localhost has the address',
    'this network': '10.0.0.1 has the address 10.0.0.1, which is not public; --mirror 10.0.0.1:80 allows it',
    'NUL': '',
    'a name without end': '',
    'another encoding': 'failed to decode',
    'many headers': '100 headers',
}


class Hostile(socketserver.ThreadingTCPServer):
    """Answers a path with its page."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.pages = dict(PAGES)

    def handle_error(self, *_: object) -> None:
        """Print nothing about a client that did not wait."""


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        head = b''
        while b'\r\n\r\n' not in head:
            head += self.request.recv(65536)
        name = head.split()[1].decode()[1:].replace('%20', ' ')
        page = self.server.pages.get(name, answer(b'HTTP/1.1 404 \x1b[31mGone\r\n'))
        page(self.request)


@pytest.fixture(scope='module')
def server() -> Iterator[Hostile]:
    with Hostile() as one:
        threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True).start()
        yield one
        one.shutdown()


@pytest.fixture
def fast(monkeypatch) -> None:
    monkeypatch.setattr(download, 'IDLE', 0.5)
    monkeypatch.setattr(download, 'BACKOFF', 0.01)
    monkeypatch.setattr(download, 'MAX_BYTES', 1 << 20)


def fetch(server: Hostile, name: str, **options) -> bytes:
    host, port = server.server_address
    file = io.BytesIO()
    url = f'http://{host}:{port}/{name.replace(" ", "%20")}'
    Downloads(**{'retries': 1, 'mirror': f'{host}:{port}'} | options).fetch(url, file)
    return file.getvalue()


@pytest.mark.parametrize('name', PAGES)
def test_each_fault_is_one_line(server, fast, name, monkeypatch):
    monkeypatch.setattr(download, 'SECONDS', 0.8 if 'now and then' in name else 30)
    with pytest.raises(Missing) as fault:
        fetch(server, name)
    assert REASONS[name] in str(fault.value)
    assert len(str(fault.value)) < 400 and str(fault.value).isprintable()


def test_every_page_has_a_reason():
    assert PAGES.keys() == REASONS.keys()


def test_what_is_whole_is_taken(server):
    """Also what is packed although nobody asked for it, and what is elsewhere on the mirror."""
    server.pages['packed'] = answer(HEAD + b'Content-Encoding: gzip\r\n', gzip.compress(b'abc'))
    server.pages['elsewhere'] = moved(b'/packed')
    assert fetch(server, 'packed') == fetch(server, 'elsewhere') == b'abc'


def test_only_the_mirror_may_be_in_this_network(server):
    port = server.server_address[1]
    for mirror in (None, 'localhost', f'127.0.0.1:{port + 1}'):
        with pytest.raises(Missing, match=r'127.0.0.1 has the address 127.0.0.1, which is not public'):
            fetch(server, 'packed', mirror=mirror)
    assert fetch(server, 'packed', mirror='127.0.0.1') == b'abc'


def test_a_public_name_of_a_private_address(monkeypatch):
    """Any of its addresses is enough, and none of them is connected to."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (one, 80)) for one in ('93.184.216.34', '10.0.0.1')]
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: found)
    monkeypatch.setattr(download, 'create_connection', None)
    with pytest.raises(Missing, match='example.org has the address 10.0.0.1'):
        Downloads(0).fetch('http://example.org/a.jpg', io.BytesIO())


@pytest.mark.parametrize(('address', 'public'), [
    ('93.184.216.34', True), ('2606:2800:220:1:248:1893:25c8:1946', True), ('64:ff9b::5db8:d822', True),
    ('127.0.0.1', False), ('10.1.2.3', False), ('172.16.0.1', False), ('192.168.1.1', False),
    ('169.254.169.254', False), ('100.64.0.1', False), ('0.0.0.0', False), ('224.0.0.1', False),
    ('240.0.0.1', False), ('255.255.255.255', False), ('::1', False), ('::', False), ('fe80::1%eth0', False),
    ('fc00::1', False), ('fec0::1', False), ('ff02::1', False), ('::ffff:127.0.0.1', False),
    ('::127.0.0.1', False), ('64:ff9b::7f00:1', False), ('2002:7f00:1::', False), ('2001:db8::1', False),
])  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) == public


def test_a_deadline_ends_what_connects_later():
    ours, theirs = socket.socketpair()
    with ours, theirs, Deadline(99) as deadline:
        deadline.end()
        deadline.watch(ours)
        assert theirs.recv(1) == b''
        with pytest.raises(Missing, match='took more than 99 s'):
            deadline.wait(0)


MEASURED = """
import re
from pathlib import Path

import prepare
import prepare
from data import download
from utils.cli import run_script

download.SECONDS, download.BACKOFF = 20, 0.01
try:
    run_script(prepare.command)
finally:
    print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024)
"""


def big_photo(side: int = 4800) -> bytes:
    file = io.BytesIO()
    Image.new('RGB', (side, side), (9, 99, 9)).save(file, 'jpeg', quality=60, progressive=True)
    return file.getvalue()


@pytest.mark.slow
def test_memory_with_eight_workers(server, tmp_path):
    """All of them at once get what takes most: bombs, endless bodies, and photos of 23 million pixels."""
    photo = big_photo()
    names = [*(f'big{n}' for n in range(3)), 'bomb', 'bomb in a bomb', 'endless body', 'endless chunks']
    names += [f'endless{n}' for n in range(8)]
    server.pages |= {name: answer(HEAD, photo) for name in names if name.startswith('big')}
    server.pages |= {f'endless{n}': PAGES['endless body'] for n in range(8)}
    annotations = write_annotations(tmp_path / 'a.json', server, names)
    text = (
        annotations.read_text()
        .replace('"width": 60', '"width": 4800')
        .replace('"height": 80', '"height": 4800')
    )
    annotations.write_text(text)
    words = ['taco', '--annotations', str(annotations), '--out', str(tmp_path / 'out'), '--retries', '0']
    command = [sys.executable, '-c', MEASURED, *words, '--mirror', '127.0.0.1']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    with (tmp_path / 'out/missing.csv').open(newline='') as file:
        missing = {Path(row['file_name']).stem for row in csv.DictReader(file)}
    assert missing == {name for name in names if not name.startswith('big')}, done.stderr
    peak = int(done.stdout.splitlines()[-1])
    print(f'{peak} MB')
    assert done.returncode == 1 and peak < 600


def test_one_signal_ends_it_and_the_same_command_goes_on(server, tmp_path):
    """While all workers wait: for a server that says nothing, and for one that says too little."""
    server.pages |= {'fine': answer(HEAD, photo_bytes()), 'mute': lambda one: time.sleep(60)}
    names = ['fine', 'mute', 'a byte now and then']
    annotations, out = write_annotations(tmp_path / 'a.json', server, names), tmp_path / 'out'
    words = ['prepare.py', 'taco', '--annotations', str(annotations), '--out', str(out)]
    words += ['--mirror', '127.0.0.1']
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not (out / 'batch_1/fine.jpg').exists():
            assert process.poll() is None
            time.sleep(0.02)
        began = time.monotonic()
        process.terminate()
        assert process.wait(30) == 75 and time.monotonic() - began < 5
        assert process.stderr.read() == 'prepare.py: interrupted\n'
    assert [path.name for path in (out / 'batch_1').iterdir()] == ['fine.jpg']
    server.pages |= dict.fromkeys(names, answer(HEAD, photo_bytes()))
    prepare.command(words[1:])
    assert len([*(out / 'batch_1').iterdir()]) == 3
