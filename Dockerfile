# Images for NVIDIA GPUs and for TPU VMs. Not built by this project's tests: no container engine was at hand.
#   docker build --build-arg EXTRA=cuda -t jaxtrain:cuda .
#   docker build --build-arg EXTRA=tpu -t jaxtrain:tpu .
# CUDA's libraries come with the packages of jax[cuda]; the host needs NVIDIA's driver and container toolkit.
# On a TPU VM: docker run --privileged --net=host jaxtrain:tpu jaxtrain env
FROM python:3.12-slim

ARG EXTRA=cuda
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/jaxtrain
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE constraints.txt ./
COPY jaxtrain jaxtrain
COPY converters converters
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRA},serve,remote,math]"

ENV JAX_COMPILATION_CACHE_DIR=/var/cache/jax
WORKDIR /work
CMD ["jaxtrain", "--help"]
