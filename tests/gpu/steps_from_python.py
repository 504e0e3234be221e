"""A recorder that runs steps from Python where a GPU's would replay graphs."""

from __future__ import annotations

from pipeline.model.graphs import CudaRecorder


class Again:
    """Runs the step from Python where a graph would be replayed, in the same batches."""

    def __init__(self, step):
        self.replay = step

    def close(self):
        self.replay = None


class FromPython(CudaRecorder):
    def record(self, step):
        return Again(step)
