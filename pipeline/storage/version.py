"""Whether a file is still the one that it was when it was first looked at."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.storage.causes import changed

# What tells two versions apart, by the names of fsspec, of object stores and of HTTP; the first that both
# times were told decides. Marks of the content come first: the same bytes written again are no change.
MARKS = (
    *("ETag", "etag", "md5Hash", "blob_id", "generation"),
    *("LastModified", "Last-Modified", "updated", "mtime", "modified", "created"),
    "size",
)
_WEAK = "W/"  # before an ETag of HTTP that a server may give to a compressed copy too


class Version:
    """A file's version, as it is first told; where storage tells nothing, all versions are alike."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def check(self, told: Mapping[str, object]) -> None:
        """Raise an OSError if what storage tells of the file, by `MARKS`, differs from what it told first."""
        found = {name: str(told[name]).removeprefix(_WEAK) for name in MARKS if told.get(name)}
        deciding = next((name for name in MARKS if name in found and name in self._first), None)
        if deciding is not None and found[deciding] != self._first[deciding]:
            raise changed()
        self._first = found | self._first

    def check_local(self, path: Path) -> None:
        """The same of a file on this machine; one that is gone by now, or is a pipe, says nothing."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return
        if stat.S_ISREG(found.st_mode):
            self.check({"mtime": (found.st_mtime_ns, found.st_size)})


@cache
def web_settings() -> dict[str, Any]:
    """Settings of fsspec for web servers: proxies of the environment, and a look at each response.

    A request that is given a `Version` as its `trace_request_ctx` fails if the response is of another one.
    All ask for the file as it is: of a copy that is compressed on the way servers tell an ETag of its own.
    """
    from aiohttp import TraceConfig

    trace = TraceConfig()
    trace.on_request_end.append(_check_response)
    headers = {"Accept-Encoding": "identity"}
    return {"client_kwargs": {"trust_env": True, "headers": headers, "trace_configs": [trace]}}


async def _check_response(session: Any, context: Any, request: Any) -> None:
    version, response = context.trace_request_ctx, request.response
    if version is None or request.method != "GET" or not response.ok:
        return
    told = {name: response.headers.get(name) for name in ("ETag", "Last-Modified")}
    version.check({**told, "size": response.headers.get("Content-Range", "").rpartition("/")[2]})
