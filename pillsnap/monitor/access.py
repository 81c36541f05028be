"""Access control of the web monitor: bind address, and Host, Origin and token of every request."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from aiohttp import web

from pillsnap.errors import UserError

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, token: str | None, public_url: str = "") -> None:
    """UserError when other machines could reach the monitor without a token, or for an invalid `public_url`."""
    if public_url:
        parts = urlsplit(public_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise UserError(f"--public-url {public_url!r} is not of the form https://name/path")
        if not token:
            raise UserError(
                f"{public_url} would expose the monitor to the network: set a token (--token or PILLSNAP_MONITOR_TOKEN)"
            )
    if not is_loopback(host) and not token:
        raise UserError(
            f"{host} would expose the monitor to the network: set a token (--token or PILLSNAP_MONITOR_TOKEN), "
            "or keep 127.0.0.1 and use `ssh -L 8888:127.0.0.1:8888`"
        )


class AccessRules:
    """Rejects requests from other origins, by DNS rebinding, or without the token, with status 403."""

    def __init__(self, bind_host: str, token: str | None, public_url: str = "") -> None:
        self.is_local = is_loopback(bind_host)
        self.token = token
        public = urlsplit(public_url)
        self.public_netloc = public.netloc.lower()
        self.public_origin = f"{public.scheme}://{self.public_netloc}"
        self.names = {*_LOCAL_NAMES, *filter(None, [public.hostname])}
        if not self.is_local:
            self.names |= {bind_host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}

    def check(self, request: web.Request, needs_token: bool = True) -> None:
        host = request.headers.get("Host", "")
        if not self._is_own_host(host):
            raise web.HTTPForbidden(text="wrong Host")
        origin = request.headers.get("Origin")
        own = origin is None or urlsplit(origin).netloc.lower() == host.lower() or origin.lower() == self.public_origin
        if not own:
            raise web.HTTPForbidden(text="wrong Origin")
        if needs_token and self.token and not hmac.compare_digest(_token_of(request).encode(), self.token.encode()):
            raise web.HTTPForbidden(text="wrong token")

    def _is_own_host(self, host: str) -> bool:
        """Accepts this machine's names and numeric addresses; any other name may be DNS rebinding."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return not self.is_local or is_loopback(name)


def _token_of(request: web.Request) -> str:
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    return request.query.get("token", "")
