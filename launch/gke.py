#!/usr/bin/env python3
"""Trains on GKE, as a JobSet of TPU or GPU nodes; needs kubectl and Python's own library only.

launch/gke.py --name=NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x8 \\
    --images=gs://BUCKET/datasets -- --config=configs/imagenet.py \\
    --config.dataset.data_dir=/images --workdir=gs://BUCKET/imagenet
launch/gke.py --name=NAME --image=IMAGE --accelerator=nvidia-h100-80gb --nodes=4 \\
    --images=gs://BUCKET/FOLDER -- ARGUMENTS

Everything behind -- goes to music_jax.main. All nodes start again, from the last checkpoint, when
one is lost or the run was stopped with everything saved; exit codes 2 and 3 end the JobSet.

To stop: kubectl delete jobset NAME --cascade=foreground, which waits until the run has saved and
ended. The same command goes on. A JobSet that has failed or is done stays in the cluster, and the
command then starts nothing: delete it first.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from typing import NamedTuple


class Tpu(NamedTuple):
    """What slices an accelerator comes in."""

    axes: int  # of a topology
    has_single_chips: bool  # as nodes of one chip


TPUS = {
    "tpu-v4-podslice": Tpu(3, False),
    "tpu-v5-lite-podslice": Tpu(2, True),
    "tpu-v5p-slice": Tpu(3, False),
    "tpu-v6e-slice": Tpu(2, True),
    "tpu7x": Tpu(3, True),
}
CHIPS_PER_NODE = 4  # but of a slice of a single chip
IMAGES = "/images"  # where --images are mounted
GRACE_SECONDS = 300  # for saving; a spot node gives less
COORDINATOR_PORT = 8476
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
BUCKET = r"gs://[a-z0-9][a-z0-9._-]*[a-z0-9](/[^,\s]*)?"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; exits with 2 and says what is wrong with it, if anything is."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, of_main = argv[:end], argv[end + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--image", required=True, help="built from launch/Dockerfile")
    parser.add_argument(
        "--accelerator",
        required=True,
        help=f"{', '.join(TPUS)} or nvidia-..., GKE's names",
    )
    parser.add_argument("--topology", help="of the TPU slice, such as 4x8")
    parser.add_argument("--nodes", type=int, help="of GPUs [1]; of TPUs --topology tells")
    parser.add_argument("--gpus-per-node", type=int, help="[8]")
    parser.add_argument(
        "--images", help=f"gs://BUCKET or gs://BUCKET/FOLDER, to be read at {IMAGES} on all nodes"
    )
    parser.add_argument("--service-account", help="Kubernetes' one, with access to the buckets")
    parser.add_argument("--max-restarts", type=int, default=100, help="of all nodes together [100]")
    parser.add_argument("--spot", action="store_true", help="cheap and preemptible nodes")
    parser.add_argument(
        "--dry-run", action="store_true", help="prints the manifest, applies nothing"
    )
    options = parser.parse_args(own)
    options.main_arguments = of_main
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?", options.name):
        parser.error("--name takes up to 32 small letters, digits and hyphens, from a letter on")
    for name, least in (("nodes", 1), ("gpus_per_node", 1), ("max_restarts", 0)):
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
    if not any(a.startswith("--workdir=") and "://" in a for a in of_main):
        parser.error("behind -- must come --workdir=gs://BUCKET/DIR, which all nodes can reach")
    return options


def problem_of_slice(options: argparse.Namespace) -> str | None:
    """Says what makes the TPU slice that was asked for impossible, if anything does."""
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
    """The chips of a topology, those of each node, and its nodes."""
    chips = math.prod(map(int, topology.split("x")))
    per_node = min(chips, CHIPS_PER_NODE)
    return chips, per_node, chips // per_node


def mount_images(where: str, template: dict, container: dict) -> None:
    """Mounts a bucket or a folder of one, to be read, by GKE's driver of Cloud Storage FUSE."""
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
    """The JobSet: one job, of one pod a node."""
    # Kubernetes replaces $(NAME) by a variable's value, and $$ by $, wherever they stand.
    arguments = [argument.replace("$", "$$") for argument in options.main_arguments]
    annotations = {}
    container = {"name": "train", "image": options.image}
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": {},
        "tolerations": [],
        "containers": [container],
    }
    if options.accelerator in TPUS:
        _, count, nodes = slice_of(options.topology)
        resource = "google.com/tpu"
        if nodes > 1:  # A slice is a node pool; its pods must not be spread over two of them.
            annotations[EXCLUSIVE] = "cloud.google.com/gke-nodepool"
        pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] = options.accelerator
        pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] = options.topology
        container["securityContext"] = {"privileged": True, "runAsUser": 0}  # to lock memory
    else:
        nodes = options.nodes or 1
        resource, count = "nvidia.com/gpu", options.gpus_per_node or 8
        pod["nodeSelector"]["cloud.google.com/gke-accelerator"] = options.accelerator
        pod["volumes"] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
        container["volumeMounts"] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
        if nodes > 1:  # JAX could ask Kubernetes, but that takes rights that pods seldom have.
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
    container["args"] = arguments
    container["resources"] = {"limits": {resource: count}}
    template = {"spec": pod}
    if options.images:
        mount_images(options.images, template, container)
    job = {
        "parallelism": nodes,
        "completions": nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": [2, 3]},
                }
            ]
        },
        "template": template,
    }
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
