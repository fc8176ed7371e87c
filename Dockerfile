# The tested packages, with the compiler for CUDA 13.0, which PyPI's torch 2.13 is built with: DeepSpeed builds some
# operators when they are first used. The packages and a copy of the repository are in /opt; /work is for yours, and
# the home folder, in which models and built operators are kept, for any user:
#
#   docker build -t sdft_ds .
#   docker run --gpus all --ipc=host -it --user "$(id -u):$(id -g)" -v "$PWD":/work sdft_ds
#
#   apptainer build sdft_ds.sif docker-daemon://sdft_ds:latest    # then: apptainer exec --nv sdft_ds.sif COMMAND
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# USER: PyTorch names a cache after the user, who need not have an account here.
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    HOME=/work \
    USER=sdft \
    PYTHONUNBUFFERED=1

# pdsh and ssh: for the deepspeed launcher on several nodes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv "$VIRTUAL_ENV" \
    && mkdir --mode 1777 /work

# The packages in a layer of their own, which a change of the sources leaves as it is.
COPY pyproject.toml README.md LICENSE /opt/packages/
COPY sdft_ds/__init__.py sdft_ds/constraints.txt /opt/packages/sdft_ds/
RUN pip install --no-cache-dir --constraint /opt/packages/sdft_ds/constraints.txt /opt/packages

COPY . /opt/sdft_ds
RUN pip install --no-cache-dir --no-deps --force-reinstall /opt/sdft_ds

WORKDIR /work
CMD ["bash"]
