"""The process in which probes run: begins and findings go to its parent, a JSON object a line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from pipeline.doctor.findings import Finding, Probe, one_line


def main(lines: Sequence[str]) -> None:
    """Run probes, each given as the JSON of its fields, until one leaves the GPU unusable."""
    say = _channel()
    for number, line in enumerate(lines):
        say({"begin": number})
        fields = json.loads(line)
        probe = Probe(**{**fields, "arguments": tuple(fields["arguments"])})
        finding, goes_on = run_probe(probe)
        say({"end": number, **asdict(finding)})
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
        finding = Finding(status="broken", text=one_line(error))
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


def _channel() -> Any:
    """A function that prints an object for the parent, whatever libraries print on stdout meanwhile."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(values: dict[str, Any]) -> None:
        print(json.dumps(values, default=str), file=channel, flush=True)

    return say
