"""All probes in child processes: one that crashes or hangs is found broken, and the others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from pipeline.doctor.findings import Finding, Probe
from pipeline.doctor.packages import OPTIONAL, REQUIRED
from pipeline.pruning.registry import method_names

FORMAT = 1  # of `as_dict`, to be raised when a key changes its meaning or goes
PROBE_TIMEOUT_S = 180.0  # the first that touches a GPU loads its libraries, some compile kernels
START_TIMEOUT_S = 60.0
LAST_WORDS = 2000  # bytes of what a child that died printed, of which the last line is told
# the caller's own path, lest a folder called pipeline where the command runs be taken for this package
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pipeline.doctor.child import main; main(int(sys.argv[2]), sys.argv[3:])"
)

GROUPS = (
    VERSIONS := "versions",
    MACHINE := "machine",
    MODEL := "embedded model",
    ATTENTION := "attention backends",
    PRECISION := "precisions",
    KERNELS := "kernels",
    SELF_TEST := "self-test",
)


def all_probes() -> tuple[Probe, ...]:
    """Every probe, in the order in which they are run and shown."""
    return (
        _probe(VERSIONS, "marsinfer", "packages:marsinfer"),
        _probe(VERSIONS, "python", "packages:python"),
        *_probes(VERSIONS, "packages:package", [*REQUIRED, *OPTIONAL]),
        *(_probe(MACHINE, name, f"machine:{name}") for name in ("gpu", "memory", "disk", "scratch")),
        _probe(MODEL, "smollm2-135m", "machine:embedded"),
        *_probes(ATTENTION, "abilities:attention", ["fa3", "flash", "cudnn", "varlen", "sdpa"]),
        *_probes(PRECISION, "abilities:precision", ["float32", "bfloat16", "float16"]),
        _probe(PRECISION, "fp8 linear layers", "abilities:fp8_linears"),
        _probe(KERNELS, "sparse attention", "abilities:sparse_attention"),
        _probe(KERNELS, "CUDA graphs", "abilities:cuda_graphs"),
        *_probes(SELF_TEST, "selftest:method", method_names()),
    )


def _probe(group: str, name: str, where: str, *arguments: str) -> Probe:
    return Probe(group=group, name=name, where=f"pipeline.doctor.{where}", arguments=arguments)


def _probes(group: str, where: str, names: Sequence[str]) -> list[Probe]:
    """One for each name, which is given to the same function."""
    return [_probe(group, name, where, name) for name in names]


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What all probes found, in their order."""

    findings: tuple[tuple[Probe, Finding], ...]

    @property
    def broken(self) -> tuple[tuple[Probe, Finding], ...]:
        return tuple(pair for pair in self.findings if pair[1].status == "broken")

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, under keys that stay as they are while `format` does."""
        checks = [
            {"group": probe.group, "name": probe.name, **asdict(finding)} for probe, finding in self.findings
        ]
        return {"format": FORMAT, "ok": not self.broken, "checks": checks}


def examine(
    probes: Sequence[Probe] | None = None,
    *,
    progress: Callable[[Probe], None] = lambda probe: None,
    timeout_s: float = PROBE_TIMEOUT_S,
) -> Examination:
    """Run `probes`, by default all; `progress` is called before each, `timeout_s` bounds each of them.

    Never raises because of what is probed: an error, a crash, a hang are findings.
    """
    left = list(all_probes() if probes is None else probes)
    findings: list[tuple[Probe, Finding]] = []
    while left:
        # a probe may take its child down, or leave it a GPU that is unusable: the rest get another one
        done = _in_child(left, progress, timeout_s)
        findings += zip(left, done, strict=False)
        left = left[len(done) :]
    return Examination(findings=tuple(findings))


def _in_child(probes: Sequence[Probe], progress: Callable[[Probe], None], timeout_s: float) -> list[Finding]:
    """What the first of `probes` find, at least one of them."""
    words = [json.dumps(sys.path), *(json.dumps(asdict(probe)) for probe in probes)]
    said, saying = Pipe(duplex=False)
    with tempfile.TemporaryFile() as printed, said:
        with saying:
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, *words[:1], str(saying.fileno()), *words[1:]],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=[saying.fileno()],
            )
        try:
            return list(_findings_of(child, said, printed, probes, progress, timeout_s))
        finally:
            child.kill()
            child.wait()


def _findings_of(
    child: subprocess.Popen[bytes],
    said: Connection,
    printed: IO[bytes],
    probes: Sequence[Probe],
    progress: Callable[[Probe], None],
    timeout_s: float,
) -> Iterator[Finding]:
    """What a child says, until it has said all, ends, or is found hanging."""
    begun = ended = 0
    while ended < len(probes):
        wait_s = timeout_s if begun > ended else START_TIMEOUT_S
        if not said.poll(wait_s):
            yield Finding("broken", f"took longer than {wait_s:g} s, and was stopped")
            return
        try:
            told = json.loads(said.recv_bytes())
        except (EOFError, OSError):
            code = child.wait()
            if code or not ended:  # else it has left a GPU that was unusable
                yield Finding("broken", _end_of(code, printed))
            return
        if told is None:
            progress(probes[begun])
            begun += 1
        else:
            yield Finding(**told)
            ended += 1


def _end_of(code: int, printed: IO[bytes]) -> str:
    """How a child died, with the last line that it printed."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - LAST_WORDS))
    last = printed.read().decode(errors="replace").strip().rpartition("\n")[2].strip()
    return f"its process {how}" + (f": {last}" if last else "")
