"""Answers of web servers, asked for again where the network fails. Nothing secret goes to a host that a redirect names, nor into a message."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from megatron_swift.utils.log import get_logger

ATTEMPTS, PAUSE = 5, 1.0  # so often, with so many seconds before the second one, doubled each time: 15 in all
LONGEST_PAUSE = 60.0  # seconds, however long a server asks us to stay away
TIMEOUT = 30.0  # seconds without a byte
SECRET = ("Authorization", "Cookie")
PASSING = (408, 425, 429)  # a later request may get another answer, as with 500 and above
AGENT = {"User-Agent": "megatron-swift", "Accept-Encoding": "identity"}

T = TypeVar("T")


class Refused(Exception):
    """An answer that asking again would not change. status : as HTTP numbers it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status} {reason}".strip())
        self.status = status


class Unreachable(Exception):
    """No whole answer came in all attempts; the text says why."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.URLError("a redirect to something that is not on the web")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and origin(newurl) != origin(req.full_url):
            for name in SECRET:
                following.remove_header(name)
        return following


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


@lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)


def open_url(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """The answer to one GET; raises what urllib does. To be called within `patiently`."""
    return _opener().open(urllib.request.Request(url, headers={**AGENT, **headers}), timeout=TIMEOUT)


def patiently(attempt: Callable[[], T], *, what: str) -> T:
    """What `attempt` returns, tried again where the network or the server fails. Refused or Unreachable, in plain words."""
    for number in range(1, ATTEMPTS + 1):
        wait = PAUSE * 2 ** (number - 1)
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in PASSING:
                raise Refused(error.code, error.reason) from None  # the error itself knows the headers
            why = f"HTTP {error.code} {error.reason}".strip()
            asked = error.headers.get("Retry-After", "")
            wait = max(wait, min(int(asked), LONGEST_PAUSE)) if asked.isdecimal() else wait
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            why = str(reason) or type(reason).__name__
        if number < ATTEMPTS:
            get_logger().warning("%s: attempt %d of %d failed: %s", what, number, ATTEMPTS, why)
            time.sleep(wait)
    raise Unreachable(f"{why}; tried {ATTEMPTS} times")


def get(url: str, headers: Mapping[str, str], *, what: str, most: int) -> bytes:
    """A whole answer of up to `most` bytes. Refused, or Unreachable where it is longer, too."""

    def attempt() -> bytes:
        with open_url(url, headers) as answer:
            found = answer.read(most + 1)
            said = answer.headers.get("Content-Length", "")
        if said.isdecimal() and len(found) < min(int(said), most + 1):
            raise ConnectionError(f"the answer broke off after {len(found)} bytes")
        return found

    found = patiently(attempt, what=what)
    if len(found) > most:
        raise Unreachable(f"the answer is longer than {most} bytes")
    return found
