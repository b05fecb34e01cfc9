"""Starts a run on this machine or through a scheduler: `jaxtrain launch`. Imports no jax.

    backend = backend_class("slurm").from_options(file)
    code = backend.submit(make_job(config, overrides, nodes=4, retries=3, name=None))

Each process is `jaxtrain train CONFIG`, which resumes from the last checkpoint.
"""

from importlib import import_module
from typing import Literal

from jaxtrain.launch.backend import Backend

BackendName = Literal["local", "slurm", "jobset", "ray"]

_BACKENDS = {
    "local": "jaxtrain.launch.local:LocalBackend",
    "slurm": "jaxtrain.launch.slurm:SlurmBackend",
    "jobset": "jaxtrain.launch.jobset:JobSetBackend",
    "ray": "jaxtrain.launch.ray_job:RayBackend",
}


def backend_class(name: BackendName) -> type[Backend]:
    """The backend of that name, whose fields are its options. Imports only its module."""
    module, _, member = _BACKENDS[name].partition(":")
    return getattr(import_module(module), member)
