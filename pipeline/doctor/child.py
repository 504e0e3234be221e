"""The process in which probes run: begins and findings go to its parent, as JSON through a pipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from typing import Any

from pipeline.doctor.findings import Finding, Probe, one_line


def main(channel: int, lines: Sequence[str]) -> None:
    """Run probes, each given as the JSON of its fields, until one leaves the GPU unusable.

    Through the file descriptor `channel` goes null before each of them, and then its finding.
    """
    with Connection(channel, readable=False) as parent:
        for line in lines:
            parent.send_bytes(b"null")
            fields = json.loads(line)
            probe = Probe(**{**fields, "arguments": tuple(fields["arguments"])})
            finding, goes_on = run_probe(probe)
            parent.send_bytes(json.dumps(asdict(finding), default=str).encode())
            if not goes_on:
                break
    # not by way of interpreter shutdown, in which libraries that were loaded may still fail
    sys.stderr.flush()
    os._exit(0)


def run_probe(probe: Probe) -> tuple[Finding, bool]:
    """What a probe finds, and whether other probes can run in this process."""
    try:
        finding = probe.run()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was to be found out
        finding = Finding("broken", one_line(error))
    harm = gpu_failure()
    if harm is None:
        return finding, True
    if finding.status != "broken":
        finding = replace(finding, status="broken", text=f"{finding.text}; it left the GPU unusable: {harm}")
    return finding, False


def gpu_failure() -> str | None:
    """An error of a kernel is told by a later call, and by all of them: why the GPU fails here, or None."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return one_line(error)
    return None
