"""torch.compile of a model's encoder, so that a resume can repeat it to the bit."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from autodo_dist.errors import AutodoError

# Of one encoder: task, shared and hyper step, validation and evaluation, each with a few sizes of a rank's part.
MOST_GRAPHS = 64


def compile_encoder(encoder: nn.Module) -> None:
    """Have the encoder compiled at its first forward of each kind and size of batch.

    Each size has a graph of its own (`dynamic=False`). By default a second size brings a graph for any, which from then
    on serves the first size too: what a step computes would hang on what the process ran before, and a resumed run
    would not be the same run. AutodoError on a CPU without a C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if next(encoder.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
        raise AutodoError(
            f"train.compile: no C++ compiler {compiler}, which torch.compile needs on a CPU; install it (apt-get "
            "install g++), name another in the variable CXX, or set train.compile=false"
        )
    torch._dynamo.config.recompile_limit = MOST_GRAPHS  # beyond it a forward is not compiled
    encoder.compile(dynamic=False)
