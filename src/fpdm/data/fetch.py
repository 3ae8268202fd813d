"""Files that are fetched from the web once, whole or not at all."""

import hashlib
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from fpdm.files import cache_folder, wait_for, write_aside

TRIES = 3
PAUSE = 2.0  # seconds before the second try; the third waits twice as long
TIMEOUT = 60.0  # seconds without a byte
FOR_NOW = (408, 429)  # of the client errors, those that another try may not meet; server errors all may not


class Refused(ValueError):
    """The server has no such file, or does not give it."""


def fetched(url: str, or_empty: bool = False) -> Path:
    """The file at `url`, as a copy in the cache. It is fetched by the first process that asks, while others wait; a
    later change at `url` goes unnoticed until the copy is removed.

    or_empty  if the server refuses the file, an empty one stands for it

    Raises ValueError naming `url` if it cannot be fetched, OSError if the copy cannot be written.
    """
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{PurePosixPath(urlsplit(url).path).name}"
    path = cache_folder() / "shards" / name
    if not path.exists():
        with wait_for(path):
            if not path.exists():
                write_aside(path, lambda aside: _fetch(url, aside, or_empty))
    return path


def _fetch(url: str, path: Path, or_empty: bool) -> None:
    for attempt in range(1, TRIES + 1):
        try:
            with path.open("wb") as file:
                for part in _parts(url):
                    file.write(part)
            return
        except Refused:
            if not or_empty:
                raise
            return
        except _Interrupted as error:
            if attempt == TRIES:
                raise ValueError(f"{url} cannot be fetched, tried {TRIES} times: {error}") from error
        time.sleep(PAUSE * attempt)


class _Interrupted(Exception):
    """What another try may mend. Not an OSError: those of the disk, a full one above all, are not to be tried again."""


def _parts(url: str) -> Iterator[bytes]:
    had = 0
    try:
        with urlopen(Request(url, headers={"User-Agent": "fpdm"}), timeout=TIMEOUT) as answer:
            promised = answer.headers["Content-Length"]
            while part := answer.read(2**20):
                had += len(part)
                yield part
    except HTTPError as error:
        with error:
            if error.code < 500 and error.code not in FOR_NOW:
                raise Refused(f"{url} cannot be fetched: the server answers {error.code} {error.reason}") from error
            raise _Interrupted(f"the server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise _Interrupted(str(error) or repr(error)) from error
    if promised is not None and had != int(promised):  # which urllib does not tell of
        raise _Interrupted(f"the transfer ended after {had} of {promised} bytes")
