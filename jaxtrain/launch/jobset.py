"""A JobSet on Kubernetes: https://jobset.sigs.k8s.io, version 0.10 or later."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import time
from typing import Any

import yaml
from pydantic import Field, PositiveInt

from jaxtrain.config.load import merged_text
from jaxtrain.launch.backend import Backend
from jaxtrain.launch.exits import STOPPED, USER_ERROR, describe_exit
from jaxtrain.launch.job import LaunchJob, dns_label

log = logging.getLogger(__name__)

_POLL_SECONDS = 10.0
_GRACE_SECONDS = 120  # from SIGTERM to SIGKILL: time to save
_PORT = 1234
_CONTAINER, _JOBS, _CONFIG = "jaxtrain", "slice", "/etc/jaxtrain"
_CONFIG_KEY = "jaxtrain/config"
_SUFFIX = len("-slice-000-0000-abcde")  # of a pod's name, which has at most 63 characters
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


class JobSetBackend(Backend):
    """A pod for each host, all restarted together. Needs a volume that the pods share for `run.dir`.

    image: has jaxtrain.
    queue: of Kueue (its LocalQueue).
    accelerator, topology: of a TPU slice, as in GKE's node labels, for example tpu-v5p-slice and 4x4x4.
    tpus_per_node: chips of a host.
    gpus_per_node: of a pod, which gets them as nvidia.com/gpu.
    volumes: persistent volume claims, and where they are mounted.
    secret: whose keys become variables of the environment, such as HF_TOKEN.
    """

    image: str
    namespace: str = "default"
    queue: str | None = None
    accelerator: str | None = None
    topology: str | None = None
    tpus_per_node: PositiveInt = 4
    gpus_per_node: PositiveInt | None = None
    volumes: dict[str, str] = Field(default_factory=dict)
    secret: str | None = None
    service_account: str | None = None

    def render(self, job: LaunchJob) -> str:
        return yaml.dump(self.manifest(job), Dumper=_Dumper, sort_keys=False)

    def submit(self, job: LaunchJob) -> int:
        """Create the JobSet with kubectl, and show the first host's output until it ends. Ctrl-C leaves it running."""
        name = dns_label(job.name, 63 - _SUFFIX)
        try:
            self._kubectl("create", "--filename=-", given=self.render(job))
        except OSError as error:
            if "AlreadyExists" not in str(error):
                raise
            raise ValueError(
                f"JobSet {name} exists: `kubectl delete jobset {name} --namespace={self.namespace}`, or give another "
                "--name"
            ) from None
        log.info("created JobSet %s in namespace %s", name, self.namespace)
        try:
            return self._follow(name)
        except KeyboardInterrupt:
            log.info("it goes on; `kubectl delete jobset %s --namespace=%s` ends it", name, self.namespace)
            return 130

    def manifest(self, job: LaunchJob) -> dict[str, Any]:
        """The JobSet. Raises ValueError for options or a number of nodes that do not fit together."""
        slices, hosts = self._shape(job.nodes)
        name = dns_label(job.name, 63 - _SUFFIX)
        labels = {} if self.queue is None else {"kueue.x-k8s.io/queue-name": self.queue}
        # One slice, one node pool: the pods of a child job are never split over two node pools.
        exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        stopped = sorted(STOPPED)
        failure_rules = [
            # A node that is taken away is not the run's failure, and does not count as a restart. Its pod is signalled,
            # and all of them save and end.
            {
                "name": "disrupted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": ["DisruptionTarget", f"exit code ({'|'.join(map(str, stopped))}) "],
            },
            {"name": "userError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
        ]
        job_spec = {
            "parallelism": hosts,
            "completions": hosts,
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": _CONTAINER,
                            "operator": "In",
                            "values": [USER_ERROR, *stopped],
                        },
                    },
                ]
            },
            "template": {
                "metadata": {"annotations": {_CONFIG_KEY: merged_text(job.config)}},
                "spec": self._pod(job, name, slices, hosts),
            },
        }
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                **({"labels": labels} if labels else {}),
                **({"annotations": exclusive} if self.topology else {}),
            },
            "spec": {
                # A run's folder is free once all of its processes have ended.
                "failurePolicy": {
                    "maxRestarts": job.retries,
                    "restartStrategy": "BlockingRecreate",
                    "rules": failure_rules,
                },
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "replicatedJobs": [{"name": _JOBS, "replicas": slices, "template": {"spec": job_spec}}],
            },
        }

    def _pod(self, job: LaunchJob, name: str, slices: int, hosts: int) -> dict[str, Any]:
        environ = [{"name": key, "value": value} for key, value in self.env.items()]
        selector: dict[str, str] = {}
        limits: dict[str, int] = {}
        if self.topology is not None:
            # GKE sets what the pods of a slice, and of several slices, need to find each other.
            selector["cloud.google.com/gke-tpu-accelerator"] = str(self.accelerator)
            selector["cloud.google.com/gke-tpu-topology"] = self.topology
            limits["google.com/tpu"] = min(self.tpus_per_node, _chips(self.topology))
        elif hosts > 1:
            environ += [
                {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{_JOBS}-0-0.{name}:{_PORT}"},
                {"name": "JAX_NUM_PROCESSES", "value": str(hosts)},
                {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}},
            ]
        if self.gpus_per_node is not None:
            limits["nvidia.com/gpu"] = self.gpus_per_node
            # All of the pod's, without asking Kubernetes, which jax would.
            devices = ",".join(map(str, range(self.gpus_per_node)))
            environ.append({"name": "JAX_LOCAL_DEVICE_IDS", "value": devices})
        config = {"path": job.config.name, "fieldRef": {"fieldPath": f"metadata.annotations['{_CONFIG_KEY}']"}}
        mounts = [{"name": claim, "mountPath": path} for claim, path in self.volumes.items()]
        claims = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in self.volumes]
        container = {
            "name": _CONTAINER,
            "image": self.image,
            "command": job.command(["jaxtrain"], f"{_CONFIG}/{job.config.name}"),
            "env": environ,
            **({"envFrom": [{"secretRef": {"name": self.secret}}]} if self.secret else {}),
            **({"resources": {"limits": limits}} if limits else {}),
            "volumeMounts": [{"name": "jaxtrain-config", "mountPath": _CONFIG}, *mounts],
        }
        return {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": _GRACE_SECONDS,
            **({"serviceAccountName": self.service_account} if self.service_account else {}),
            **({"nodeSelector": selector} if selector else {}),
            # The network between slices is faster without Kubernetes' own.
            **({"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if slices > 1 else {}),
            "containers": [container],
            "volumes": [{"name": "jaxtrain-config", "downwardAPI": {"items": [config]}}, *claims],
        }

    def _shape(self, nodes: int | None) -> tuple[int, int]:
        """The number of slices, and of hosts in each."""
        if (self.accelerator is None) != (self.topology is None):
            raise ValueError("options accelerator and topology belong together")
        if self.topology is None:
            return 1, nodes or 1
        if self.gpus_per_node is not None:
            raise ValueError("options topology and gpus_per_node are of TPUs and of GPUs: give one of them")
        hosts = max(_chips(self.topology) // self.tpus_per_node, 1)
        if (nodes or hosts) % hosts:
            raise ValueError(
                f"--nodes={nodes}: a slice of topology {self.topology} has {hosts} hosts, each with "
                f"{self.tpus_per_node} chips: give a multiple of {hosts}"
            )
        return (nodes or hosts) // hosts, hosts

    def _follow(self, name: str) -> int:
        since, shown = None, None
        while True:
            since = self._show_logs(name, since)
            status = json.loads(self._kubectl("get", "jobset", name, "--output=json")).get("status", {})
            state = status.get("terminalState") or f"{status.get('restarts', 0)} restarts"
            if state != shown:
                log.info("JobSet %s: %s", name, state)
                shown = state
            if state == "Completed":
                return 0
            if state == "Failed":
                return self._exit_code(name)
            time.sleep(_POLL_SECONDS)

    def _show_logs(self, name: str, since: str | None) -> str | None:
        """Print what process 0 writes, until its pod ends. Returns the time up to which the output was printed."""
        first = f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/job-index=0"
        first += ",batch.kubernetes.io/job-completion-index=0"
        after = [] if since is None else [f"--since-time={since}"]
        command = ["logs", "--follow", f"--selector={first}", "--tail=-1", *after]
        done = subprocess.run(self._command(*command), stderr=subprocess.DEVNULL, check=False)
        # It fails while the pod waits for a node.
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if done.returncode == 0 else since

    def _exit_code(self, name: str) -> int:
        """The exit code of the pod that failed first, if it is still there."""
        pods = self._kubectl("get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={name}", "--output=json")
        failed = [
            (ended["finishedAt"], ended["exitCode"], pod["metadata"]["name"])
            for pod in json.loads(pods)["items"]
            for container in pod["status"].get("containerStatuses", [])
            if (ended := container["state"].get("terminated")) and ended["exitCode"]
        ]
        if not failed:
            return 1
        _, code, pod = min(failed)
        log.error("pod %s ended with %s", pod, describe_exit(code))
        return code

    def _command(self, *arguments: str) -> list[str]:
        return ["kubectl", f"--namespace={self.namespace}", *arguments]

    def _kubectl(self, *arguments: str, given: str | None = None) -> str:
        """The output of kubectl. Raises OSError with its message if it fails."""
        command = self._command(*arguments)
        try:
            return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout
        except FileNotFoundError:
            raise OSError("kubectl is not installed: submit what --dry-run prints from where it is") from None
        except subprocess.CalledProcessError as error:
            raise OSError(f"kubectl {arguments[0]} failed: {error.stderr.strip()}") from None


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines, such as the config, as it is."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _chips(topology: str) -> int:
    sizes = topology.split("x")
    if not all(size.isdigit() for size in sizes):
        raise ValueError(f"topology={topology}: expected sizes such as 4x4x4")
    return math.prod(int(size) for size in sizes)
