"""Fixtures of an S3-compatible server, which keeps its buckets while it is stopped."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator

import pytest

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",
}


class Server:
    """Started on a free port, and on the same one again."""

    def __init__(self) -> None:
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]
        self._is_up = True

    def stop(self) -> None:
        self._server.stop()
        self._is_up = False

    def ensure(self) -> None:
        """Start again, if it was stopped."""
        if not self._is_up:
            self.start()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ.update(
        ENVIRONMENT
    )  # for moto itself, which runs in threads, s3fs, and commands that tests start
    server = Server()
    os.environ["AWS_ENDPOINT_URL"] = server.url
    yield server
    server.stop()
    for name in (*ENVIRONMENT, "AWS_ENDPOINT_URL"):
        del os.environ[name]


@pytest.fixture
def bucket(s3_server: Server) -> str:
    """The URL of a new bucket, on a server that runs."""
    s3_server.ensure()
    import s3fs

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
    return f"s3://{name}"


def objects(bucket: str) -> list[str]:
    """The names of all objects."""
    import s3fs

    name = bucket.removeprefix("s3://")
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    return sorted(key.removeprefix(f"{name}/") for key in fs.find(name))


def put(url: str, data: bytes) -> str:
    import s3fs

    s3fs.S3FileSystem(use_listings_cache=False).pipe_file(url, data)
    return url
