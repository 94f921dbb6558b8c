"""One picture at a time through DALI: to learn whether it decodes, and how large it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from autodo_dist.errors import AutodoError

# A pipeline that runs when it is told to and hands errors to the caller. With queues of its own, DALI 2.4 may crash on
# the run after one that failed.
SYNCHRONOUS = {"prefetch_queue_depth": 1, "exec_async": False, "exec_pipelined": False}


class Decoder:
    """Decodes single pictures on the CPU, as training does."""

    def __init__(self) -> None:
        self._pipeline: Any = None

    def shape(self, encoded: bytes) -> tuple[int, int]:
        """Decode a picture: (height, width) after EXIF orientation. AutodoError says why it does not decode."""
        if self._pipeline is None:
            self._pipeline = pipeline_def(_graph)(batch_size=1, num_threads=1, device_id=None, **SYNCHRONOUS)
            self._pipeline.build()
        try:
            (image,) = self._pipeline.run(encoded=[np.frombuffer(encoded, np.uint8)])
        except RuntimeError as error:
            self._pipeline = None  # DALI gives up a pipeline that has failed
            raise AutodoError(f"DALI does not decode it: {reason(error)}") from error
        height, width, _ = image.shape()[0]
        return height, width


def reason(error: Exception) -> str:
    """The part of DALI's long message that says what was wrong."""
    said = str(error).rpartition("encountered:")[2].split("Current pipeline object")[0]
    return " ".join(said.split())[:200].rstrip(" :") or type(error).__name__


def _graph() -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
