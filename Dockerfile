# A GPU image with everything in requirements.txt and NVIDIA's apex; docs/images.md says how to build and run it.
# The CUDA release is the one that requirements.txt's torch is built with (13.0), as apex is compiled for both.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# Compute capabilities that apex is compiled for: A100; A10, RTX 30; H100; B200; RTX 50. Fewer build faster.
ARG TORCH_CUDA_ARCH_LIST="8.0;8.6;9.0;10.0;12.0"
# Files compiled at once; each may take some GB of memory.
ARG MAX_JOBS=4

COPY images/install.sh /opt/install.sh
RUN bash /opt/install.sh system
COPY requirements.txt /opt/autodo_dist/
# Two layers, so that a failed build of apex installs no package again.
RUN bash /opt/install.sh packages
# hadolint ignore=DL3059
RUN bash /opt/install.sh apex
COPY pyproject.toml README.md /opt/autodo_dist/
COPY autodo_dist /opt/autodo_dist/autodo_dist
COPY launcher /opt/autodo_dist/launcher
COPY configs /opt/autodo_dist/configs
RUN bash /opt/install.sh project check

ENV PATH="/opt/venv/bin:$PATH"
WORKDIR /work
CMD ["autodo", "doctor"]
