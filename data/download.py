"""Download files from servers that may be broken or hostile, within limits of bytes and time.

    Downloads(retries=5).fetch('https://example.org/a.jpg', file)

Public addresses alone are asked, at the start and after each redirect: a list from the internet must not lead
into this network. It is the address that is connected to which is checked, not one of an earlier look-up.
"""

import random
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any, BinaryIO
from urllib.parse import urljoin

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url
from urllib3.util.connection import create_connection

from utils.errors import one_line

MAX_BYTES = 64 << 20  # of a file, unpacked
SECONDS = 300  # for a file, with its retries
IDLE = urllib3.Timeout(connect=10, read=30)  # seconds; read is the longest pause between two bytes
BACKOFF = 0.5  # seconds before the second retry; the delay doubles with each retry
MAX_DELAY = 60.0  # seconds, also of a server's Retry-After
MAX_REDIRECTS = 5
PART = 1 << 16  # bytes that are read at a time
TEMPORARY = (429, 500, 502, 503, 504)  # HTTP statuses that are retried
MOVED = (301, 302, 303, 307, 308)
# what urllib3 and http.client raise for what a server sends; ValueError is for addresses
FAULTS = (urllib3.exceptions.HTTPError, urllib3.exceptions.HTTPWarning, OSError, ValueError)
GLOBAL_UNICAST = ip_network('2000::/3')
NAT64 = ip_network('64:ff9b::/96')  # IPv4 addresses as a network without IPv4 sees them


class Missing(Exception):
    """Say in one line why a file cannot be had."""


class Temporary(Exception):
    """Say in one line why a file cannot be had now; wait for `delay` seconds, if the server names them."""

    def __init__(self, message: str, delay: float | None = None) -> None:
        super().__init__(message)
        self.delay = delay


@dataclass(frozen=True)
class Downloads:
    """How files are downloaded: how often one is tried again, and the host, or 'host:port', whose address may
    be one of this network.
    """

    retries: int
    mirror: str | None = None

    def fetch(self, url: str, file: BinaryIO) -> None:
        """Download into an open file. Raises Missing, and OSError if the file cannot be written."""
        with Deadline(SECONDS) as deadline:
            for attempt in range(self.retries + 1):
                file.seek(0)
                file.truncate()
                try:
                    for part in self.read(url, deadline):
                        file.write(part)
                    deadline.check()  # a connection that was closed may look like the end of a body
                    return
                except Temporary as error:
                    if attempt == self.retries:
                        raise Missing(str(error)) from None
                    backoff = BACKOFF * (2**attempt - 1 + random.random())
                    deadline.wait(min(MAX_DELAY, backoff if error.delay is None else error.delay))

    def read(self, url: str, deadline: 'Deadline') -> Iterator[bytes]:
        """Read what is at a URL, or where it leads. Raises Missing and Temporary."""
        try:
            for _ in range(MAX_REDIRECTS + 1):
                with self.pool(url, deadline) as pool:
                    response = self.request(pool, url)
                    if response.status not in MOVED or 'Location' not in response.headers:
                        yield from read_body(response)
                        return
                    response.close()  # its body may be endless, so it is not read
                url = urljoin(url, response.headers['Location'])
            raise Missing(f'is redirected more than {MAX_REDIRECTS} times')
        except FAULTS as error:
            deadline.check()
            reason = one_line(getattr(error, 'reason', None) or error)[:300]
            if isinstance(error, ValueError) and not isinstance(error, urllib3.exceptions.ProtocolError):
                raise Missing(reason) from None
            raise Temporary(reason) from None

    def pool(self, url: str, deadline: 'Deadline') -> urllib3.HTTPConnectionPool:
        """Return a pool of one connection to the host of a URL. Raises Missing, and ValueError."""
        parts = parse_url(url)
        if parts.scheme not in POOLS or not parts.host:
            raise Missing(f'leads to {url[:200]!r}, expected http(s)://')
        options: dict[str, Any] = {'timeout': IDLE, 'retries': False, 'downloads': self, 'deadline': deadline}
        return POOLS[parts.scheme](parts.host, parts.port, **options)

    def request(self, pool: urllib3.HTTPConnectionPool, url: str) -> urllib3.BaseHTTPResponse:
        """Ask for a URL; its body is not read yet."""
        headers = {'Accept-Encoding': 'identity'}
        target = parse_url(url).request_uri
        return pool.urlopen('GET', target, headers=headers, redirect=False, preload_content=False)

    def connect(self, connection: HTTPConnection) -> socket.socket:
        """Connect to a host, if all its addresses are public or it is the mirror. Raises Missing."""
        host, port = connection.host, connection.port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise urllib3.exceptions.NameResolutionError(host, connection, error) from None
        addresses = [str(entry[4][0]) for entry in found]
        is_mirror = self.mirror in (host, f'{host}:{port}')
        private = next((one for one in addresses if not (is_mirror or is_public(one))), None)
        if private is not None:
            fault = f'{host} has the address {private}, which is not public'
            raise Missing(f'{fault}; --mirror {host}:{port} allows it')
        for number, address in enumerate(addresses, 1):
            try:
                return create_connection(
                    (address, port), connection.timeout, socket_options=connection.socket_options
                )
            except TimeoutError:
                if number == len(addresses):
                    raise urllib3.exceptions.ConnectTimeoutError(connection, f'{host} timed out') from None
            except OSError as error:
                if number == len(addresses):
                    raise urllib3.exceptions.NewConnectionError(connection, one_line(error)) from None
        raise Missing(f'{host} has no address')


def is_public(text: str) -> bool:
    """Tell whether an IP address is of the internet: not of this machine, this network, or reserved."""
    address = ip_address(text.partition('%')[0])
    if address.version == 6:
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = IPv4Address(int(address) % 2**32)
        if inner is None and address not in GLOBAL_UNICAST:
            return False
        address = inner or address
    return address.is_global and not address.is_multicast


class Deadline:
    """Close the connections of a download after so many seconds. A timeout would not: each byte renews it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.over = seconds, threading.Event()
        self.sockets: list[socket.socket] = []
        self.timer = threading.Timer(seconds, self.end)
        self.timer.daemon = True

    def __enter__(self) -> 'Deadline':
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        for one in self.sockets:
            one.close()

    def end(self) -> None:
        self.over.set()
        for one in self.sockets:
            with suppress(OSError):  # it is closed already
                one.shutdown(socket.SHUT_RDWR)

    def watch(self, connection: socket.socket) -> socket.socket:
        """Close a connection at the deadline, whoever holds it by then: TLS takes its socket over."""
        self.sockets.append(connection.dup())
        if self.over.is_set():
            self.end()
        return connection

    def wait(self, seconds: float) -> None:
        """Wait for so many seconds. Raises Missing if the deadline comes first."""
        self.over.wait(seconds)
        self.check()

    def check(self) -> None:
        """Raise Missing after the deadline."""
        if self.over.is_set():
            raise Missing(f'took more than {self.seconds:g} s')


class Checked:
    """Makes a connection of urllib3 by Downloads.connect."""

    def __init__(self, *args: Any, downloads: Downloads, deadline: Deadline, **options: Any) -> None:
        super().__init__(*args, **options)
        self.downloads, self.deadline = downloads, deadline

    def _new_conn(self) -> socket.socket:
        return self.deadline.watch(self.downloads.connect(self))


class CheckedHTTP(Checked, HTTPConnection):
    pass


class CheckedHTTPS(Checked, HTTPSConnection):
    pass


class HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = CheckedHTTP


class HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = CheckedHTTPS


POOLS = {'http': HTTPPool, 'https': HTTPSPool}


def read_body(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Read the unpacked body of an answer. Raises Missing and Temporary."""
    if response.status in TEMPORARY:
        after = response.headers.get('Retry-After', '')
        delay = float(after) if re.fullmatch(r'\d{1,6}', after, re.ASCII) else None
        raise Temporary(describe_status(response.status), delay)
    if response.status != 200:
        raise Missing(describe_status(response.status))
    size = 0
    while part := response.read1(PART, decode_content=True):
        size += len(part)
        if size > MAX_BYTES:
            raise Missing(f'is larger than {MAX_BYTES >> 20} MB')
        yield part


def describe_status(status: int) -> str:
    """Say what a server answers, in the words of the standard: its own may be anything."""
    with suppress(ValueError):
        return f'the server answers {status} {HTTPStatus(status).phrase}'
    return f'the server answers {status}'
