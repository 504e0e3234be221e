"""Which probes there are."""

from __future__ import annotations

from pipeline.doctor.findings import Probe
from pipeline.doctor.packages import OPTIONAL, REQUIRED
from pipeline.pruning.registry import method_names

VERSIONS, MACHINE, MODEL, ATTENTION, PRECISION, KERNELS, SELF_TEST = (
    "versions",
    "machine",
    "embedded model",
    "attention backends",
    "precisions",
    "kernels",
    "self-test",
)
GROUPS = (VERSIONS, MACHINE, MODEL, ATTENTION, PRECISION, KERNELS, SELF_TEST)


def all_probes() -> tuple[Probe, ...]:
    """Every probe, in the order in which they are run and shown."""
    packages, machine, abilities = (
        f"pipeline.doctor.{name}:" for name in ("packages", "machine", "abilities")
    )
    probes = [
        Probe(group=VERSIONS, name="marsinfer", where=packages + "marsinfer"),
        Probe(group=VERSIONS, name="python", where=packages + "python"),
    ]
    probes += [
        Probe(group=VERSIONS, name=name, where=packages + "package", arguments=(name,))
        for name in (*REQUIRED, *OPTIONAL)
    ]
    probes += [
        Probe(group=MACHINE, name=name, where=machine + name) for name in ("gpu", "memory", "disk", "scratch")
    ]
    probes.append(Probe(group=MODEL, name="smollm2-135m", where=machine + "embedded"))
    probes += [
        Probe(group=ATTENTION, name=name, where=abilities + "attention", arguments=(name,))
        for name in ("fa3", "flash", "cudnn", "varlen", "sdpa")
    ]
    probes += [
        Probe(group=PRECISION, name=name, where=abilities + "precision", arguments=(name,))
        for name in ("float32", "bfloat16", "float16")
    ]
    probes.append(Probe(group=PRECISION, name="fp8 linear layers", where=abilities + "fp8_linears"))
    probes.append(Probe(group=KERNELS, name="sparse attention", where=abilities + "sparse_attention"))
    probes.append(Probe(group=KERNELS, name="CUDA graphs", where=abilities + "cuda_graphs"))
    probes += [
        Probe(group=SELF_TEST, name=name, where="pipeline.doctor.selftest:method", arguments=(name,))
        for name in method_names()
    ]
    return tuple(probes)
