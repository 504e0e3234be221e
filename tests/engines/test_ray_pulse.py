"""The processes of Ray that a run cannot do without: alive, slow, and gone."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from pipeline.engines import ray_cluster
from pipeline.engines.ray_pulse import Pulse
from pipeline.errors import MarsError

MESSAGE = (
    "Ray's {} on this machine has died, and the workers with it; finished rows are kept, and --resume "
    "continues; its messages are under /tmp/ray/session_latest/logs"
)


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_who_does_not_listen_any_more_has_died(name, tmp_path):
    path, local = str(tmp_path / "s"), socket.create_server(("127.0.0.1", 0))
    with local, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        unix.listen(1)
        ends = {"raylet": unix, "gcs_server": local}
        pulse = Pulse(addresses={"raylet": path, "gcs_server": f"127.0.0.1:{local.getsockname()[1]}"})
        pulse.check()
        ends[name].close()
        with pytest.raises(MarsError) as told:
            pulse.check(at_once=True)
    assert (str(told.value), pulse.lost) == (MESSAGE.format(name), name)


def test_a_ray_of_the_runs_own_is_closed_to_others_unless_the_environment_says_otherwise(monkeypatch):
    for name in ray_cluster.AUTHENTICATION:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    ray_cluster._close_to_others()
    mode, secret = os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]
    assert (mode, len(secret)) == ("token", 64)
    ray_cluster._close_to_others()
    assert os.environ["RAY_AUTH_TOKEN"] == secret
    os.environ.clear()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray_cluster._close_to_others()
    assert os.environ == {"RAY_AUTH_MODE": "disabled"}
