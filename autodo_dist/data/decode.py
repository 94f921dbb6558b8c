"""DALI pipelines that may fail, and one picture at a time through one: to learn whether it decodes, and its size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from autodo_dist.errors import DecodeError


class Pipeline:
    """A DALI pipeline with one output, made when it first runs and anew after it has failed.

    It runs when it is told to and hands errors to the caller: with queues of its own, DALI 2.4 may crash on the run
    after one that failed.
    """

    def __init__(
        self,
        graph: Callable[..., Any],
        *arguments: Any,
        most: int,
        threads: int,
        gpu: int | None,
        enable_conditionals: bool = False,
    ) -> None:
        self._build = functools.partial(
            pipeline_def(graph, enable_conditionals=enable_conditionals),
            *arguments,
            batch_size=most,
            num_threads=threads,
            device_id=gpu,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        self._built: Any = None

    def run(self, **feed: Any) -> Any:
        """The output for a batch, valid until the next run. DecodeError says what DALI found wrong."""
        if self._built is None:
            self._built = self._build()
            self._built.build()
        try:
            (output,) = self._built.run(**feed)
        except RuntimeError as error:
            self._built = None  # DALI gives up a pipeline that has failed
            raise DecodeError(f"DALI does not decode it: {reason(error)}") from error
        return output


class Decoder:
    """Decodes single pictures on the CPU, as training does."""

    def __init__(self) -> None:
        self._pipeline = Pipeline(_graph, most=1, threads=1, gpu=None)

    def shape(self, encoded: bytes) -> tuple[int, int]:
        """Decode a picture: (height, width) after EXIF orientation. DecodeError says why it does not decode."""
        height, width, _ = self._pipeline.run(encoded=[np.frombuffer(encoded, np.uint8)]).shape()[0]
        return height, width


def reason(error: Exception) -> str:
    """The part of DALI's long message that says what was wrong."""
    said = str(error).rpartition("encountered:")[2].split("Current pipeline object")[0]
    return " ".join(said.split())[:200].rstrip(" :") or type(error).__name__


def _graph() -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
