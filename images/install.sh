#!/usr/bin/env bash
# What Dockerfile and autodo_dist.def put on NVIDIA's CUDA image, step by step as named in the arguments:
#   system    compilers and Python            packages  requirements.txt, in /opt/venv
#   apex      NVIDIA's apex, from its source  project   /opt/autodo_dist itself
#   check     what was built can be imported, and `autodo doctor` finds no error
# No step needs a GPU.
set -euo pipefail
export PATH="/opt/venv/bin:/usr/local/cuda/bin:$PATH"

system() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    # git: pip fetches apex with it; iproute2: `ip` finds the interface for gloo; python3-dev: torch.compile
    apt-get install --yes --no-install-recommends build-essential ca-certificates git iproute2 python3-dev python3-venv
    rm -rf /var/lib/apt/lists/*
}

packages() {
    python3 -m venv /opt/venv
    # ninja and the next three: apex is built without isolation, so that it sees this torch.
    pip install --no-cache-dir ninja packaging setuptools wheel
    sed '/^-e /d' /opt/autodo_dist/requirements.txt > /tmp/requirements.txt
    pip install --no-cache-dir -r /tmp/requirements.txt
}

apex() {
    # apex wants the CUDA release that torch was built with; it says so less clearly.
    local toolkit built
    toolkit=$(nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
    built=$(python -c 'import torch; print(torch.version.cuda)')
    if [ "$toolkit" != "$built" ]; then
        echo "install.sh: nvcc is of CUDA $toolkit, torch of $built; start from an image nvidia/cuda:$built.*-devel-*" >&2
        exit 1
    fi
    # Which commit, and why: autodo_dist/nvidia_apex.py.
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex@9e3568a6f90fbc1996a06f8f9e99310bdaf2253a
}

project() {
    pip install --no-cache-dir --no-deps --no-build-isolation --editable /opt/autodo_dist
}

check() {
    cd /tmp # where no folder of the project is taken for a package
    python -c 'import torch, amp_C; from apex.optimizers import FusedAdam, FusedLAMB, FusedSGD'
    autodo doctor --runs /tmp/runs
}

for step in "$@"; do
    case "$step" in
        system | packages | apex | project | check) "$step" ;;
        *)
            echo "install.sh: no step $step; there are system, packages, apex, project, check" >&2
            exit 2
            ;;
    esac
done
