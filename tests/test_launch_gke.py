"""The launcher for GKE: what it refuses, and that Kubernetes takes what it makes."""

import json
import re

import kubernetes_validate
import pytest
from launching import AWKWARD, launch

GKE = ("--name=run", "--image=image", "--accelerator=tpu-v5-lite-podslice", "--topology=4x8")
V5P = (*GKE[:2], "--accelerator=tpu-v5p-slice")
GPU = (*GKE[:2], "--accelerator=nvidia-h100-80gb")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*GKE, "--", "--workdir=runs/x"), "pass --workdir=gs://"),
        ((*GKE[:3], "--", AWKWARD), "needs --topology with 2 axes, such as 4x8"),
        ((*GKE, "--name=Run", "--", AWKWARD), "--name takes up to 32 small letters"),
        ((*GKE, "--accelerator=v5e", "--", AWKWARD), "--accelerator is one of"),
        ((*GPU, "--nodes=0", "--", AWKWARD), "--nodes must be 1 or more; got 0"),
        ((*GPU, "--gpus-per-node=-1", "--", AWKWARD), "--gpus-per-node must be 1 or"),
        ((*GKE, "--max-restarts=-1", "--", AWKWARD), "--max-restarts must be 0 or more"),
        ((*GKE, "--topology=4x4x4", "--", AWKWARD), "with 2 axes, such as 4x8; got"),
        ((*V5P, "--topology=4x8", "--", AWKWARD), "with 3 axes, such as 4x4x4; got"),
        ((*V5P, "--topology=1x1x1", "--", AWKWARD), "has a multiple of the 4 of a node"),
        ((*GKE, "--topology=3x3", "--", AWKWARD), "of a node, or a single one"),
        ((*GKE, "--topology=0x4", "--", AWKWARD), "got '0x4'"),
        ((*GKE, "--nodes=4", "--", AWKWARD), "8 nodes of 4, not --nodes=4"),
        ((*GKE, "--gpus-per-node=4", "--", AWKWARD), "--gpus-per-node is for GPUs"),
        ((*GPU, "--images=bucket/x", "--", AWKWARD), "--images is gs://BUCKET or"),
        ((*GPU, "--images=gs://b/x,uid=0", "--", AWKWARD), "without commas; got"),
        ((*GPU, "--images=gs://BUCKET/x", "--", AWKWARD), "the bucket's name in small letters"),
        ((*GPU, "--sweep=0", "--", AWKWARD), "--sweep must be 1 or more; got 0"),
        ((*GPU, "--sweep=2", "--", "--output=gs://b/o", "--runs=r"), "pass --runs=gs://"),
        ((*GPU, "--sweep=2", "--", AWKWARD), "pass --output=gs://"),
        ((*GPU, "--sweep=2", "--nodes=2", "--", AWKWARD), "a pod of a sweep has one node"),
        ((*GKE, "--sweep=2", "--", AWKWARD), "a pod of a sweep has one node"),
    ],
)
def test_wrong_use_is_one_clear_line_and_exit_code_2(arguments, message):
    result = launch("gke.py", *arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_help_describes_how_to_resume():
    assert "kubectl delete jobset NAME" in launch("gke.py", "--help").stdout


def jobset(*arguments):
    result = launch("gke.py", *arguments, "--dry-run", "--", "--config=c.py", AWKWARD)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def expand(argument, variables):
    """Expands a container's argument as Kubernetes does: $(NAME), and $$ for $."""

    def value(found):
        if found[0] == "$$":
            return "$"
        return variables.get(found[1], found[0])  # what is not defined stays as it is

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, argument)


def test_arguments_arrive_at_main_as_they_were_given():
    given = [AWKWARD, "$(A)", "$$(A)", "$$$(A)", "a$$b", "$", "$$", "$(A", "$A", "$(B)$$", "\\$(A)"]
    result = launch("gke.py", *GKE, "--dry-run", "--", *given)
    (container,) = one_job(json.loads(result.stdout))["template"]["spec"]["containers"]
    assert [expand(argument, {"A": "value"}) for argument in container["args"]] == given


@pytest.mark.parametrize(
    ("arguments", "nodes", "limits"),
    [
        (GKE, 8, {"google.com/tpu": 4}),
        ((*GKE, "--topology=1x1", "--spot"), 1, {"google.com/tpu": 1}),
        ((*V5P, "--topology=4x4x4", "--nodes=16"), 16, {"google.com/tpu": 4}),
        ((*GKE, "--images=gs://bucket"), 8, {"google.com/tpu": 4}),
        ((*GPU, "--nodes=3", "--service-account=a"), 3, {"nvidia.com/gpu": 8}),
        ((*GPU, "--nodes=3", "--images=gs://bucket/a/b/"), 3, {"nvidia.com/gpu": 8}),
    ],
)
def test_gke_creates_a_jobset_with_a_job_that_is_valid_for_kubernetes(arguments, nodes, limits):
    whole = jobset(*arguments)
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert whole["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    (replicated,) = whole["spec"]["replicatedJobs"]
    assert replicated.keys() == {"name", "replicas", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
    kubernetes_validate.validate(job | replicated["template"], "1.33", strict=True)

    spec = replicated["template"]["spec"]
    assert (spec["parallelism"], spec["completions"]) == (nodes, nodes)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == limits
    given = [expand(a, {"JOB_COMPLETION_INDEX": "1"}) for a in container["args"]]
    assert given[:2] == ["--config=c.py", AWKWARD]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    if "nvidia.com/gpu" in limits:
        assert environment["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
        assert environment["JAX_PLATFORMS"].startswith("cuda")  # without a driver, it fails
        assert given[2:] == [
            "--coordinator_address=run-train-0-0.run:8476",
            "--num_processes=3",
            "--process_id=1",
        ]
    else:
        assert given[2:] == []


@pytest.mark.parametrize(
    ("arguments", "keeps_together"),
    [(GKE, True), ((*GKE, "--topology=2x2"), False), ((*GPU, "--nodes=3"), False)],
)
def test_gke_keeps_a_slice_on_one_node_pool(arguments, keeps_together):
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    expected = {key: "cloud.google.com/gke-nodepool"} if keeps_together else {}
    assert jobset(*arguments)["metadata"] == {"name": "run", "annotations": expected}


@pytest.mark.parametrize("arguments", [GKE, GPU])
@pytest.mark.parametrize(
    ("where", "options"),
    [("gs://images", "implicit-dirs"), ("gs://images/a/b/", "implicit-dirs,only-dir=a/b")],
)
def test_gke_mounts_the_images_read_only(arguments, where, options):
    template = one_job(jobset(*arguments, f"--images={where}"))["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == "images"]
    assert volume["csi"] == {
        "driver": "gcsfuse.csi.storage.gke.io",
        "readOnly": True,
        "volumeAttributes": {"bucketName": "images", "mountOptions": options},
    }
    (container,) = template["spec"]["containers"]
    mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounted["/images"] == {"name": "images", "mountPath": "/images", "readOnly": True}
    assert ("/dev/shm" in mounted) == (arguments is GPU)


def test_gke_mounts_nothing_by_default():
    template = one_job(jobset(*GKE))["template"]
    assert template.keys() == {"spec"}
    assert "volumes" not in template["spec"]


def one_job(whole):
    (replicated,) = whole["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_gke_restarts_all_but_wrong_input_and_divergence():
    whole = jobset(*GKE)
    spec = whole["spec"]
    job = one_job(whole)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    assert job["backoffLimit"] == 0  # any other failure fails the job at once, and so restarts all
    assert spec["failurePolicy"]["maxRestarts"] == 100
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [
        (GPU, {"nvidia.com/gpu": 1}),
        ((*GPU, "--gpus-per-node=2", "--images=gs://bucket"), {"nvidia.com/gpu": 2}),
        ((*GKE, "--topology=2x2", "--spot"), {"google.com/tpu": 4}),
    ],
)
def test_gke_runs_a_sweep_as_an_indexed_job_that_is_valid_for_kubernetes(arguments, limits):
    given = ["--config=c.py", "--output=gs://b/it's $(A)", "--runs=gs://b/r"]
    result = launch("gke.py", *arguments, "--sweep=4", "--dry-run", "--", *given)
    assert result.returncode == 0, result.stderr
    job = json.loads(result.stdout)
    kubernetes_validate.validate(job, "1.33", strict=True)
    assert (job["kind"], job["metadata"]) == ("Job", {"name": "run"})
    spec = job["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (4, 4, "Indexed")
    # Each pod restarts by itself, but for wrong input and failed trainings.
    assert spec["backoffLimitPerIndex"] == 100
    assert "backoffLimit" not in spec
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailIndex", [2, 3])
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == limits
    assert container["command"] == ["python", "-m", "music_jax.claims"]
    arguments = [expand(a, {"JOB_COMPLETION_INDEX": "3", "A": "value"}) for a in container["args"]]
    assert arguments == [*given, "--worker=3/4"]
