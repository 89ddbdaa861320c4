# Two images from one recipe; written to be built elsewhere (no container engine runs on the project's machines), linted by a test.
#
#   docker build --target cpu  -t linear-neox:cpu  .
#   docker build --target cuda -t linear-neox:cuda .
#
# Both hold the launchers (OpenMPI, pdsh, ssh) and start nothing by themselves: the command is what Slurm, Kubernetes or SkyPilot run.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    OMP_NUM_THREADS=1
# g++ is for Triton, which compiles its launchers at the first use of a kernel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ git iproute2 openmpi-bin openssh-client openssh-server pdsh tini \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /run/sshd
WORKDIR /workspace
COPY requirements/ requirements/
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python", "deepy.py", "--help"]

# The CPU build of torch comes from PyTorch's own index; the rest from PyPI. constraints.txt has every version.
FROM base AS cpu
RUN pip install --no-deps --index-url https://download.pytorch.org/whl/cpu -c requirements/constraints.txt torch \
    && pip install -c requirements/constraints.txt -r requirements/requirements.txt -r requirements/requirements-mpi.txt \
        -r requirements/requirements-wandb.txt -r requirements/requirements-tensorboard.txt
COPY . .
ENV DS_ACCELERATOR=cpu

# PyPI's torch brings the CUDA libraries with it; the host gives the driver. Optional kernels of others (requirements-cuda.txt) need a
# CUDA toolkit to compile and are left out.
FROM base AS cuda
RUN pip install -c requirements/constraints.txt -r requirements/requirements.txt -r requirements/requirements-mpi.txt \
        -r requirements/requirements-wandb.txt -r requirements/requirements-tensorboard.txt
COPY . .
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
