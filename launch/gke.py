#!/usr/bin/env python3
"""Trains on GKE, as a JobSet of TPU or GPU nodes; needs kubectl and Python's own library only.

launch/gke.py --name=NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x8 \\
    -- --config=configs/imagenet.py --workdir=gs://BUCKET/imagenet
launch/gke.py --name=NAME --image=IMAGE --accelerator=nvidia-h100-80gb --nodes=4 -- ARGUMENTS

Everything behind -- goes to music_jax.main. All nodes start again, from the last checkpoint, when
one is lost or the run was stopped with everything saved; exit codes 2 and 3 end the JobSet.
"""

import argparse
import json
import math
import re
import subprocess
import sys

# Chips of a node of a slice that has several; a smaller slice is one node.
CHIPS_PER_NODE = {
    "tpu-v4-podslice": 4,
    "tpu-v5-lite-podslice": 4,
    "tpu-v5p-slice": 4,
    "tpu-v6e-slice": 4,
    "tpu7x": 4,
}
GRACE_SECONDS = 300  # for saving; a spot node gives less
COORDINATOR_PORT = 8476


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
        help=f"{', '.join(CHIPS_PER_NODE)} or nvidia-..., GKE's names",
    )
    parser.add_argument("--topology", help="of the TPU slice, such as 4x8")
    parser.add_argument("--nodes", type=int, default=1, help="of GPUs [1]")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="[8]")
    parser.add_argument("--service-account", help="with access to the bucket of the workdir")
    parser.add_argument("--max-restarts", type=int, default=100, help="of all nodes together [100]")
    parser.add_argument("--spot", action="store_true", help="cheap and preemptible nodes")
    parser.add_argument(
        "--dry-run", action="store_true", help="prints the manifest, applies nothing"
    )
    options = parser.parse_args(own)
    options.main_arguments = of_main
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?", options.name):
        parser.error("--name takes up to 32 small letters, digits and hyphens, from a letter on")
    if options.accelerator in CHIPS_PER_NODE:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", options.topology or ""):
            parser.error(f"--accelerator={options.accelerator} needs --topology, such as 4x8")
    elif not options.accelerator.startswith("nvidia-"):
        parser.error(f"--accelerator is one of {', '.join(CHIPS_PER_NODE)}, or nvidia-...")
    elif options.topology:
        parser.error("--topology is for TPUs; GPUs take --nodes and --gpus-per-node")
    if not any(a.startswith("--workdir=") and "://" in a for a in of_main):
        parser.error("behind -- must come --workdir=gs://BUCKET/DIR, which all nodes can reach")
    return options


def manifest(options: argparse.Namespace) -> dict:
    """The JobSet: one job, of one pod a node."""
    # $$(NAME) is how Kubernetes is told to leave $(NAME) alone.
    arguments = [argument.replace("$(", "$$(") for argument in options.main_arguments]
    container = {"name": "train", "image": options.image}
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": {},
        "tolerations": [],
        "containers": [container],
    }
    if options.accelerator in CHIPS_PER_NODE:
        chips = math.prod(map(int, options.topology.split("x")))
        per_node = min(chips, CHIPS_PER_NODE[options.accelerator])
        nodes = chips // per_node
        resource, count = "google.com/tpu", per_node
        pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] = options.accelerator
        pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] = options.topology
        container["securityContext"] = {"privileged": True, "runAsUser": 0}  # to lock memory
    else:
        nodes = options.nodes
        resource, count = "nvidia.com/gpu", options.gpus_per_node
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
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name},
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
