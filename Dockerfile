# Image for every node of a cluster, with CUDA.   docker build -t registry.example.com/pillsnap:0.2.0 .
# The locked torch wheels include CUDA 13.2; the base image adds the settings for the driver.
FROM nvidia/cuda:13.2.0-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The Ray cluster launcher calls openssh-client and rsync on the nodes; torch.compile needs g++ and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates g++ openssh-client python3.12 python3.12-dev python3.12-venv rsync \
 && rm -rf /var/lib/apt/lists/* \
 && userdel --remove ubuntu \
 && useradd --create-home --uid 1000 pillsnap

WORKDIR /opt/pillsnap
COPY requirements.lock ./
RUN python3.12 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes -r requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY pillsnap ./pillsnap
COPY jobs ./jobs
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    YOLO_AUTOINSTALL=False
USER 1000
CMD ["pillsnap", "--help"]
