"""The JobSet: valid, with the right shape and restarts, and followed through a stub of kubectl."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from launch_stubs import path_with, write_config, write_stub

from jaxtrain.launch import jobset
from jaxtrain.launch.job import make_job
from jaxtrain.launch.jobset import JobSetBackend

SCHEMA = yaml.safe_load((Path(__file__).parent / "jobset_schema.yaml").read_text())
POD_128 = ["image=repo/jaxtrain", "queue=research", "accelerator=tpu-v5p-slice", "topology=4x4x4"]
OPTIONS = {
    "v5p-128": [*POD_128, "volumes={runs: /mnt/runs}", "secret=hf", "env={A: '1'}"],
    "cpu": ["image=repo/jaxtrain"],
    "gpu": ["image=repo/jaxtrain", "gpus_per_node=8", "service_account=trainer", "namespace=ml"],
}


@pytest.fixture
def job(tmp_path):
    return lambda nodes=None, name=None: make_job(
        write_config(tmp_path), ["train.steps=4"], nodes=nodes, retries=5, name=name
    )


def manifest(job, options) -> dict:
    """Checked against JobSet's schema, as read back from the YAML that is submitted."""
    found = yaml.safe_load(JobSetBackend.from_options(None, options).render(job))
    jsonschema.validate(found, SCHEMA)
    return found


def pods_of(found: dict) -> dict:
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_the_schema_refuses_what_jobset_does_not_know(job):
    found = manifest(job(), OPTIONS["cpu"])
    for place, key in ((found["spec"], "restarts"), (pods_of(found), "image"), (found["spec"]["failurePolicy"], "max")):
        place[key] = 3
        with pytest.raises(jsonschema.ValidationError, match=key):
            jsonschema.validate(found, SCHEMA)
        del place[key]


@pytest.mark.parametrize(
    ("options", "nodes", "slices", "hosts"),
    [
        (OPTIONS["v5p-128"], None, 1, 16),
        (OPTIONS["v5p-128"], 32, 2, 16),
        ([*POD_128[:-1], "topology=2x2x1"], None, 1, 1),
        (["image=x", "accelerator=tpu-v5-lite-podslice", "topology=2x4", "tpus_per_node=8"], 3, 3, 1),
        (OPTIONS["gpu"], 4, 1, 4),
        (OPTIONS["cpu"], None, 1, 1),
    ],
)
def test_a_slice_has_the_hosts_of_its_topology(job, options, nodes, slices, hosts):
    found = manifest(job(nodes), options)
    [replicated] = found["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert (replicated["replicas"], spec["parallelism"], spec["completions"]) == (slices, hosts, hosts)
    assert ("hostNetwork" in pods_of(found)) == (slices > 1)


def test_a_v5p_128(job):
    found = manifest(job(), OPTIONS["v5p-128"])
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    pod = pods_of(found)
    [container] = pod["containers"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["env"] == [{"name": "A", "value": "1"}]  # GKE tells the hosts about each other
    assert container["envFrom"] == [{"secretRef": {"name": "hf"}}]
    assert {each["mountPath"] for each in container["volumeMounts"]} == {"/etc/jaxtrain", "/mnt/runs"}
    assert {each["name"] for each in pod["volumes"]} == {each["name"] for each in container["volumeMounts"]}


def test_hosts_with_gpus_find_each_other(job):
    found = manifest(job(4), OPTIONS["gpu"])
    [container] = pods_of(found)["containers"]
    environ = {each["name"]: each.get("value") for each in container["env"]}
    # JobSet's name of the first pod of the first job, in the service of the JobSet.
    assert environ["JAX_COORDINATOR_ADDRESS"] == "tiny-slice-0-0.tiny:1234"
    assert environ["JAX_NUM_PROCESSES"] == "4" and environ["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7"
    assert "JAX_PROCESS_ID" in environ and container["resources"] == {"limits": {"nvidia.com/gpu": 8}}


def test_a_pod_reads_the_config_that_was_launched(job):
    launched = job()
    found = manifest(launched, OPTIONS["cpu"])
    [container] = pods_of(found)["containers"]
    assert container["command"] == ["jaxtrain", "train", "/etc/jaxtrain/sft.yaml", "train.steps=4"]
    template = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    [item] = pods_of(found)["volumes"][0]["downwardAPI"]["items"]
    [(key, text)] = template["metadata"]["annotations"].items()
    assert item == {"path": "sft.yaml", "fieldRef": {"fieldPath": f"metadata.annotations['{key}']"}}
    assert text == launched.config.read_text()


def test_all_pods_restart_together_but_not_after_an_error_of_the_users(job):
    found = manifest(job(), OPTIONS["v5p-128"])
    policy, spec = found["spec"]["failurePolicy"], found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (5, "BlockingRecreate")
    assert spec["backoffLimit"] == 0 and pods_of(found)["restartPolicy"] == "Never"
    disrupted, codes = spec["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    values = codes["onExitCodes"].pop("values")
    assert values == sorted(values)  # Kubernetes requires it
    assert codes["onExitCodes"] == {"containerName": "jaxtrain", "operator": "In"}

    def action(message: str) -> str:
        """Of the first rule that matches, for a job that failed by its podFailurePolicy."""
        for rule in policy["rules"]:
            assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
        return "RestartJobSet"

    code = (
        "Container jaxtrain for pod ml/tiny-slice-0-3-abcde failed with exit code {} matching FailJob rule at index 1"
    )
    assert action(code.format(2)) == "FailJobSet" and 2 in values
    assert action(code.format(143)) == "RestartJobSetAndIgnoreMaxRestarts" and 143 in values
    evicted = "Pod ml/tiny-0-3 has condition DisruptionTarget matching FailJob rule at index 0"
    assert action(evicted) == "RestartJobSetAndIgnoreMaxRestarts"
    assert not {1, 137} & set(values)  # these restart, and count


@pytest.mark.parametrize(
    ("options", "nodes", "name", "message"),
    [
        (POD_128, 8, None, "has 16 hosts"),
        ([*POD_128, "gpus_per_node=8"], None, None, "of TPUs and of GPUs"),
        (POD_128[:-1], None, None, "belong together"),
        ([*POD_128[:-1], "topology=big"], None, None, "topology=big"),
        (OPTIONS["cpu"], None, "x" * 60, "--name"),
    ],
)
def test_what_does_not_fit_together_is_refused(job, options, nodes, name, message):
    with pytest.raises(ValueError, match=message):
        JobSetBackend.from_options(None, options).render(job(nodes, name))


def finished(code: int, at: str) -> dict:
    ended = {"terminated": {"exitCode": code, "finishedAt": at}}
    return {"metadata": {"name": f"pod-{code}"}, "status": {"containerStatuses": [{"state": ended}]}}


@pytest.mark.parametrize(
    ("state", "pods", "code"),
    [
        ("Completed", [], 0),
        ("Failed", [finished(134, "2026-01-01T00:00:09Z"), finished(2, "2026-01-01T00:00:07Z")], 2),
        ("Failed", [], 1),
    ],
)
def test_a_jobset_is_created_and_followed_to_its_end(job, tmp_path, monkeypatch, capfd, state, pods, code):
    monkeypatch.setattr(jobset, "_POLL_SECONDS", 0.01)
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    (tmp_path / "pods").write_text(json.dumps({"items": pods}))
    kubectl = f"""
cd {tmp_path}; [ "$1" == "--namespace=ml" ] || exit 1
case "$2 $3" in
  create*) cat > created.yaml ;;
  logs*) [ -e waited ] && echo "step 1" || exit 1 ;;
  "get jobset") [ -e waited ] && echo '{{"status": {{"terminalState": "{state}"}}}}' || echo "{{}}"; touch waited ;;
  "get pods") cat pods ;;
esac
"""
    write_stub(tmp_path / "bin", "kubectl", kubectl)
    launched, backend = job(), JobSetBackend.from_options(None, OPTIONS["gpu"])
    assert backend.submit(launched) == code
    assert capfd.readouterr().out == "step 1\n"
    assert yaml.safe_load((tmp_path / "created.yaml").read_text()) == backend.manifest(launched)


def test_a_jobset_of_that_name_is_not_replaced(job, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    write_stub(tmp_path / "bin", "kubectl", 'echo "Error (AlreadyExists): tiny" >&2; exit 1')
    with pytest.raises(ValueError, match="kubectl delete jobset tiny"):
        JobSetBackend.from_options(None, OPTIONS["cpu"]).submit(job())
