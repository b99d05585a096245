#!/usr/bin/env python3
"""Trains on GKE, as a JobSet of TPU or GPU nodes; needs only kubectl and the standard library.

Runs a sweep of trainings as an indexed Job, whose pods have a TPU node or a GPU each.

launch/gke.py --name=NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x8 \\
    --images=gs://BUCKET/datasets -- --config=configs/imagenet.py \\
    --config.dataset.data_dir=/images --workdir=gs://BUCKET/imagenet
launch/gke.py --name=NAME --image=IMAGE --accelerator=nvidia-h100-80gb --nodes=4 \\
    --images=gs://BUCKET/FOLDER -- ARGUMENTS
launch/gke.py --name=NAME --image=IMAGE --accelerator=nvidia-l4 --sweep=8 -- \\
    --config=configs/cifar10.py --output=gs://BUCKET/results --runs=gs://BUCKET/runs

Arguments behind -- are passed to music_jax.main, or to music_jax.claims with --sweep. All nodes
restart from the last checkpoint when one is lost or the run was stopped with everything saved; exit
codes 2 and 3 end the JobSet. The pods of a sweep restart one by one; exit codes 2 and 3 end a pod.

To stop a run: kubectl delete jobset NAME --cascade=foreground, which waits until the run has saved
and ended; for a sweep, kubectl delete job NAME. Rerun the command to resume it. While a failed or
finished JobSet or Job is in the cluster, the command starts nothing: delete it first.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from typing import NamedTuple


class Tpu(NamedTuple):
    """Slices of an accelerator."""

    axes: int  # axes of its topologies
    has_single_chips: bool  # whether there are nodes of one chip


TPUS = {
    "tpu-v4-podslice": Tpu(3, False),
    "tpu-v5-lite-podslice": Tpu(2, True),
    "tpu-v5p-slice": Tpu(3, False),
    "tpu-v6e-slice": Tpu(2, True),
    "tpu7x": Tpu(3, True),
}
CHIPS_PER_NODE = 4  # except in a slice of a single chip
IMAGES = "/images"  # mount point of --images
GRACE_SECONDS = 300  # for saving; a spot node has less
COORDINATOR_PORT = 8476
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
BUCKET = r"gs://[a-z0-9][a-z0-9._-]*[a-z0-9](/[^,\s]*)?"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the command line; exits with 2 and a message if it is wrong."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, of_main = argv[:end], argv[end + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, help="name of the JobSet or Job")
    parser.add_argument("--image", required=True, help="image built from launch/Dockerfile")
    parser.add_argument(
        "--accelerator",
        required=True,
        help=f"{', '.join(TPUS)} or nvidia-..., as GKE names it",
    )
    parser.add_argument("--topology", help="topology of the TPU slice, such as 4x8")
    parser.add_argument(
        "--nodes", type=int, help="number of GPU nodes [1]; for TPUs it follows from --topology"
    )
    parser.add_argument(
        "--gpus-per-node", type=int, help="number of GPUs per node [8; 1 with --sweep]"
    )
    parser.add_argument(
        "--sweep", type=int, help="run music_jax.claims instead, divided among this many pods"
    )
    parser.add_argument(
        "--images", help=f"gs://BUCKET or gs://BUCKET/FOLDER to mount read-only at {IMAGES}"
    )
    parser.add_argument(
        "--service-account", help="Kubernetes service account with access to the buckets"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=100,
        help="number of restarts of all nodes, or of each pod with --sweep [100]",
    )
    parser.add_argument("--spot", action="store_true", help="use cheaper, preemptible nodes")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the manifest without applying it"
    )
    options = parser.parse_args(own)
    options.main_arguments = of_main
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?", options.name):
        parser.error("--name takes up to 32 small letters, digits and hyphens, from a letter on")
    leasts = {"nodes": 1, "gpus_per_node": 1, "sweep": 1, "max_restarts": 0}
    for name, least in leasts.items():
        given = getattr(options, name)
        if given is not None and given < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more; got {given}")
    if options.accelerator in TPUS:
        problem = problem_of_slice(options)
        if problem:
            parser.error(problem)
    elif not options.accelerator.startswith("nvidia-"):
        parser.error(f"--accelerator is one of {', '.join(TPUS)}, or nvidia-...")
    elif options.topology:
        parser.error("--topology is for TPUs; GPUs take --nodes and --gpus-per-node")
    if options.images is not None and not re.fullmatch(BUCKET, options.images):
        parser.error(
            "--images is gs://BUCKET or gs://BUCKET/FOLDER, the bucket's name in small letters and "
            f"without commas; got {options.images!r}"
        )
    if options.sweep and node_count(options) > 1:
        parser.error("a pod of a sweep has one node: leave --nodes out, and use a small --topology")
    for flag in ("output", "runs") if options.sweep else ("workdir",):
        if not any(a.startswith(f"--{flag}=") and "://" in a for a in of_main):
            parser.error(f"pass --{flag}=gs://BUCKET/DIR behind --, which all nodes can reach")
    return options


def node_count(options: argparse.Namespace) -> int:
    """Returns the number of nodes of a run."""
    return slice_of(options.topology)[2] if options.topology else options.nodes or 1


def problem_of_slice(options: argparse.Namespace) -> str | None:
    """Returns why the requested TPU slice is impossible, if it is."""
    tpu, topology = TPUS[options.accelerator], options.topology or ""
    if not re.fullmatch("x".join(tpu.axes * [r"[1-9]\d{0,3}"]), topology):
        got = f"; got {topology!r}" if topology else ""
        return (
            f"--accelerator={options.accelerator} needs --topology with {tpu.axes} axes, such as "
            f"{'4x8' if tpu.axes == 2 else '4x4x4'}{got}"
        )
    chips, per_node, nodes = slice_of(topology)
    if chips % CHIPS_PER_NODE and not (chips == 1 and tpu.has_single_chips):
        return (
            f"--topology={topology} makes {chips} chips; a slice of {options.accelerator} has a "
            f"multiple of the {CHIPS_PER_NODE} of a node"
            + (", or a single one" if tpu.has_single_chips else "")
        )
    if options.gpus_per_node is not None:
        return "--gpus-per-node is for GPUs; TPUs take --topology"
    if options.nodes not in (None, nodes):
        return (
            f"--topology={topology} has {chips} chips on {nodes} nodes of {per_node}, not "
            f"--nodes={options.nodes}; leave --nodes out"
        )
    return None


def slice_of(topology: str) -> tuple[int, int, int]:
    """Returns the number of chips of a topology, of chips per node, and of nodes."""
    chips = math.prod(map(int, topology.split("x")))
    per_node = min(chips, CHIPS_PER_NODE)
    return chips, per_node, chips // per_node


def mount_images(where: str, template: dict, container: dict) -> None:
    """Mounts a bucket or one of its folders read-only by GKE's Cloud Storage FUSE driver."""
    bucket, _, folder = where.removeprefix("gs://").partition("/")
    options = "implicit-dirs"
    if folder.strip("/"):
        options += f",only-dir={folder.strip('/')}"
    template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
    template["spec"].setdefault("volumes", []).append(
        {
            "name": "images",
            "csi": {
                "driver": "gcsfuse.csi.storage.gke.io",
                "readOnly": True,
                "volumeAttributes": {"bucketName": bucket, "mountOptions": options},
            },
        }
    )
    container.setdefault("volumeMounts", []).append(
        {"name": "images", "mountPath": IMAGES, "readOnly": True}
    )


def manifest(options: argparse.Namespace) -> dict:
    """Returns the JobSet, with one pod per node, or the Job of a sweep, with one pod per share."""
    # Kubernetes replaces $(NAME) by the value of a variable, and $$ by $, anywhere.
    arguments = [argument.replace("$", "$$") for argument in options.main_arguments]
    annotations = {}
    nodes = node_count(options)
    container = {"name": "train", "image": options.image}
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": {},
        "tolerations": [],
        "containers": [container],
    }
    if options.accelerator in TPUS:
        resource, count = "google.com/tpu", slice_of(options.topology)[1]
        if nodes > 1:  # a slice is a node pool, over which its pods must not be spread
            annotations[EXCLUSIVE] = "cloud.google.com/gke-nodepool"
        pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] = options.accelerator
        pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] = options.topology
        container["securityContext"] = {"privileged": True, "runAsUser": 0}  # to lock memory
        environment = [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}]
    else:
        resource, count = "nvidia.com/gpu", options.gpus_per_node or (1 if options.sweep else 8)
        pod["nodeSelector"]["cloud.google.com/gke-accelerator"] = options.accelerator
        # Where GKE mounts the driver; without it, JAX would fall back to the CPU.
        environment = [
            {"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"},
            {"name": "JAX_PLATFORMS", "value": "cuda,cpu"},
        ]
        pod["volumes"] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
        container["volumeMounts"] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
        if nodes > 1:  # pods seldom have the permission by which JAX could ask Kubernetes
            arguments += [
                f"--coordinator_address={options.name}-train-0-0.{options.name}:{COORDINATOR_PORT}",
                f"--num_processes={nodes}",
                "--process_id=$(JOB_COMPLETION_INDEX)",
            ]
    pod["tolerations"].append({"key": resource, "operator": "Exists", "effect": "NoSchedule"})
    if options.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"].append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
        )
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.sweep:
        container["command"] = ["python", "-m", "music_jax.claims"]
        arguments.append(f"--worker=$(JOB_COMPLETION_INDEX)/{options.sweep}")
        uid = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}}
        environment.append({"name": "MUSIC_JAX_SWEEP", "valueFrom": uid})
    container["args"] = arguments
    container["env"] = environment
    container["resources"] = {"limits": {resource: count}}
    template = {"spec": pod}
    if options.images:
        mount_images(options.images, template, container)
    pods = options.sweep or nodes
    final = {"containerName": "train", "operator": "In", "values": [2, 3]}
    action = "FailIndex" if options.sweep else "FailJob"
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "podFailurePolicy": {"rules": [{"action": action, "onExitCodes": final}]},
        "template": template,
    }
    if options.sweep:
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": options.name},
            "spec": job | {"backoffLimitPerIndex": options.max_restarts},
        }
    job["backoffLimit"] = 0
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "annotations": annotations},
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [
                    {
                        "name": "wrongInputOrDiverged",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "train", "replicas": 1, "template": {"spec": job}}],
        },
    }


def main() -> int:
    """Applies the manifest, or prints it."""
    options = parse_arguments(sys.argv[1:])
    text = json.dumps(manifest(options), indent=2)
    if options.dry_run:
        print(text)
        return 0
    try:
        return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode
    except FileNotFoundError:
        print("error: kubectl is not installed", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
