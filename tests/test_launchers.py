"""The launchers for clusters: the commands that they run, and the validity of their files."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from launching import AWKWARD, ROOT, commands, launch

TPU_VM = ("--name=slice", "--zone=us-central1-a")

# Plays gcloud: takes notes, and answers `describe` and `ssh` as the test has laid down, in turn.
FAKE_GCLOUD = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
kind = next((k for k in ("describe", "scp", "create", "delete") if k in sys.argv), "ssh")
if kind == "ssh":
    parts = {{"pkill": "stop", "local.sh": "run", "rsync": "images"}}
    kind = next((parts[part] for part in parts if part in sys.argv[-1]), "setup")
with open(here / "calls", "a") as f:
    f.write(kind + "\\n")
answers = here / kind
if answers.exists():
    first, *rest = json.loads(answers.read_text())
    answers.write_text(json.dumps(rest or [first]))
    if isinstance(first, int):
        sys.exit(first)
    print(first, file=sys.stderr if "NOT_FOUND" in first else sys.stdout)
    sys.exit("NOT_FOUND" in first)
"""


@pytest.fixture
def cloud(tmp_path):
    """A directory to put on PATH, whose gcloud answers by files and takes notes in `calls`."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(FAKE_GCLOUD.format(python=sys.executable))
    gcloud.chmod(0o755)
    return tmp_path


def train_on(cloud, *options, long_seconds="600", **answers):
    for kind, values in answers.items():
        (cloud / kind).write_text(json.dumps(values))
    result = launch(
        "tpu_vm.sh",
        *("train", *TPU_VM, "--type=v5litepod-32", "--spot", *options, "--", AWKWARD),
        PATH=f"{cloud}{os.pathsep}{os.environ['PATH']}",
        POLL_SECONDS="0.01",
        LONG_SECONDS=long_seconds,
    )
    calls = (cloud / "calls").read_text().split()
    return result, [call for call in calls if call not in ("describe", "scp")]


def test_tpu_vm_trains_again_after_preemption_until_it_is_done(cloud):
    result, calls = train_on(
        cloud,
        # The first is the check before the loop; the slice is lost while the run is under way.
        describe=[
            *("NOT_FOUND", "NOT_FOUND", "PROVISIONING", "ACTIVE"),
            *("SUSPENDING", "SUSPENDED", "NOT_FOUND", "ACTIVE"),
        ],
        run=[255, 75, 0],
    )
    assert result.returncode == 0, result.stderr
    assert calls == ["create", "setup", "run", "stop", "delete", "create", "setup", "run", "run"]


@pytest.mark.parametrize("code", [2, 3])
def test_tpu_vm_does_not_retry_permanent_failures(cloud, code):
    result, calls = train_on(cloud, describe=["ACTIVE"], run=[code])
    assert (result.returncode, calls) == (code, ["setup", "run"])


def test_tpu_vm_stops_after_repeated_failures(cloud):
    result, calls = train_on(cloud, describe=["ACTIVE"], run=[1])
    assert (result.returncode, calls.count("run")) == (1, 3)
    assert "failed 3 times on an active slice" in result.stderr


def test_tpu_vm_does_not_count_preemptions(cloud):
    # Each time ssh breaks, the slice still calls itself active for a while, and is then lost.
    preempted = ["ACTIVE", "ACTIVE", "SUSPENDED", "NOT_FOUND"]
    result, calls = train_on(
        cloud, describe=["ACTIVE", *(4 * preempted), "ACTIVE"], run=[255, 255, 255, 255, 0]
    )
    assert result.returncode == 0, result.stderr
    assert (calls.count("create"), calls.count("setup"), calls.count("run")) == (4, 5, 5)


def test_tpu_vm_counts_only_failures_soon_after_the_start(cloud):
    result, calls = train_on(cloud, long_seconds="0", describe=["ACTIVE"], run=[1, 1, 1, 1, 0])
    assert (result.returncode, calls.count("run")) == (0, 5), result.stderr


def test_tpu_vm_copies_the_images_to_every_new_slice(cloud):
    result, calls = train_on(
        cloud,
        "--images=gs://bucket/a b",
        describe=[*(3 * ["ACTIVE"]), "SUSPENDED", "NOT_FOUND", "ACTIVE"],
        images=[0, 255, 0],  # the second, on the new slice, breaks off and is gone on with
        run=[255, 0],
    )
    assert result.returncode == 0, result.stderr
    first, second = ["setup", "images", "run"], ["setup", "images", "setup", "images", "run"]
    assert calls == [*first, "stop", "delete", "create", *second]


@pytest.mark.parametrize("command", ["train", "setup"])
def test_tpu_vm_names_the_images_unchanged(command):
    options = (*TPU_VM, "--type=v6e-8", "--images=gs://bucket/a b", "--dry-run", "--", AWKWARD)
    result = launch("tpu_vm.sh", command, *options)
    assert result.returncode == 0, result.stderr
    (copy,) = [line for line in commands(result.stdout) if "rsync" in line[-1]]
    assert "--worker=all" in copy
    words = shlex.split(copy[-1].removeprefix("--command="))
    assert words == [
        *("mkdir", "-p", "/tmp/images", "&&"),
        *("gcloud", "storage", "rsync", "--recursive", "gs://bucket/a b", "/tmp/images"),
    ]


def test_tpu_vm_passes_the_arguments_unchanged(tmp_path):
    result = launch(
        "tpu_vm.sh",
        *("train", *TPU_VM, "--type=v6e-16", "--spot", "--project=p", "--dry-run"),
        *("--", "--config=configs/imagenet.py", AWKWARD),
        PATH=f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin",
    )
    assert result.returncode == 0, result.stderr
    create, archive, copy, setup, run = commands(result.stdout)
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "slice"]
    assert {"--spot", "--project=p", "--runtime-version=v2-alpha-tpuv6e"} <= set(create)
    assert archive[:4] == ["git", "-C", str(ROOT), "archive"]
    assert copy[-1] == run[-2] == setup[-2] == "--worker=all"
    remote = shlex.split(run[-1].removeprefix("--command="))
    assert remote[-2:] == ["--config=configs/imagenet.py", AWKWARD]
    # What the workers' shells are given is a script that is at least well formed.
    for command in (setup[-1], run[-1]):
        script = command.removeprefix("--command=")
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_vm.sh", (), "expected a command"),
        ("tpu_vm.sh", ("trian",), "unknown command 'trian'"),
        ("tpu_vm.sh", ("status", "--name=a"), "--name=NAME and --zone=ZONE are needed"),
        ("tpu_vm.sh", ("create", *TPU_VM), "--type=TYPE is needed"),
        ("tpu_vm.sh", ("run", *TPU_VM, "--config=x"), "unknown option '--config=x'"),
        ("tpu_vm.sh", ("run", *TPU_VM, "--", "--workdir=runs/x"), "pass --workdir=gs://"),
        ("tpu_vm.sh", ("setup", *TPU_VM, "--images=b/x"), "--images is gs://BUCKET or"),
        ("tpu_vm.sh", ("run", *TPU_VM, "--images=gs://b", "--", AWKWARD), "for train and setup"),
        ("xpk.sh", ("--cluster=c", "--", "--workdir=runs/x"), "pass --workdir=gs://"),
    ],
)
def test_wrong_use_is_one_clear_line_and_exit_code_2(script, arguments, message):
    result = launch(script, *arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.py", "xpk.sh"])
def test_help_is_no_error(script):
    result = launch(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--dry-run" in result.stdout


def test_xpk_passes_the_arguments_unchanged():
    result = launch("xpk.sh", "--cluster=c", "--workload=w", "--dry-run", "--", AWKWARD)
    assert result.returncode == 0, result.stderr
    ((*xpk, command),) = commands(result.stdout)
    assert xpk[:5] == ["xpk", "workload", "create", "--cluster=c", "--workload=w"]
    run = shlex.split(command.removeprefix("--command="))
    assert run == ["exec", "python", "-m", "music_jax.main", AWKWARD]


def test_xpk_restarts_all_but_wrong_input_and_divergence():
    result = launch("xpk.sh", "--cluster=c", "--dry-run", "--", AWKWARD)
    (given,) = [a for a in commands(result.stdout)[0] if a.startswith("--restart-on-exit-codes=")]
    restarting = {42, *range(127, 256)}  # xpk's own, to which it adds those that it is given
    for part in given.partition("=")[2].split(","):
        first, _, last = part.partition("-")
        restarting |= set(range(int(first), int(last or first) + 1))
    assert set(range(1, 256)) - restarting == {2, 3}


@pytest.fixture
def slurm(tmp_path):
    """A checkout whose environment is a stand-in, and a Slurm that takes notes."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch/environment.sh").write_text(
        "venv=/venv\nensure_environment() { echo ready >>notes; }\n"
    )
    commands = {
        "srun": 'exit "$SRUN_EXITS"',
        "scontrol": """case $1 in
          --version) echo "slurm-wlm ${VERSION:-22.05.8}" ;;
          show) echo "PreemptTime=${PREEMPTED:-None}" ;;
        esac""",
        "squeue": 'echo "$STATE"',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>notes\n{body}\n')
        (tmp_path / name).chmod(0o755)

    def submit(*arguments, **environment):
        spooled = shutil.copy(tmp_path / "launch/slurm.sbatch", tmp_path / "slurm_script")
        environment |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
        environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", spooled, *arguments],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    submit.notes = tmp_path / "notes"
    return submit


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (0, "RUNNING", False),
        (2, "RUNNING", False),
        (3, "RUNNING", False),
        (75, "RUNNING", True),
        (75, "COMPLETING", False),  # as after `scancel`
        (143, "RUNNING", True),  # SIGTERM while Python starts
    ],
)
def test_slurm_requeues_only_what_was_stopped_and_saved(slurm, code, state, requeued):
    result = slurm("--config=c.py", "--workdir=a b", SRUN_EXITS=str(code), STATE=state)
    assert result.returncode == code, result.stderr
    ready, srun, *rest = slurm.notes.read_text().splitlines()
    assert ready == "ready"
    assert srun.endswith("/venv/bin/python -m music_jax.main --config=c.py --workdir=a b")
    assert ("scontrol requeue 7" in rest) == requeued


@pytest.mark.parametrize(
    ("version", "preempted", "requeued"),
    [
        ("22.05.8", "2026-11-29T13:11:02", True),
        ("23.11.10", "2026-11-29T13:11:02", True),
        ("24.05.0", "2026-11-29T13:11:02", False),
        ("24.11.5", "None", True),
    ],
)
def test_slurm_requeues_a_preempted_job_once(slurm, version, preempted, requeued):
    result = slurm(SRUN_EXITS="75", STATE="RUNNING", VERSION=version, PREEMPTED=preempted)
    assert result.returncode == 75, result.stderr
    assert ("scontrol requeue 7" in slurm.notes.read_text()) == requeued


def test_slurm_asks_about_one_member_of_an_array_alone(slurm):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}  # SLURM_JOB_ID of the last is 7
    slurm(SRUN_EXITS="75", STATE="RUNNING", VERSION="24.11.5", **array)
    asked = [line for line in slurm.notes.read_text().splitlines() if "7" in line]
    assert asked == [
        "squeue --noheader --jobs=7_3 --format=%T",
        "scontrol show job 7_3",
        "scontrol requeue 7_3",
    ]


@pytest.mark.parametrize("given", [{"SLURM_CPUS_PER_TASK": "12"}, {}])
def test_slurm_forwards_the_number_of_cores_per_task(slurm, given):
    result = slurm("--config=c.py", SRUN_EXITS="0", STATE="RUNNING", **given)
    assert result.returncode == 0, result.stderr
    assert ("--cpus-per-task=12 " in slurm.notes.read_text()) == bool(given)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_slurm_dry_run_prints_the_command_and_runs_nothing(slurm, place):
    arguments = ["--config=c.py", "--workdir=a b"]
    result = slurm(*arguments[:place], "--dry-run", *arguments[place:])
    assert result.returncode == 0, result.stderr
    *options, command = result.stdout.splitlines()
    assert shlex.split(command)[-3:] == ["music_jax.main", *arguments]
    assert options == [
        line
        for line in (ROOT / "launch/slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert "#SBATCH --requeue" in options
    assert not slurm.notes.exists()


@pytest.mark.parametrize(
    ("given", "module", "passed"),
    [
        (["--seeds=2"], "claims", ["--seeds=2"]),
        (["pack", "--output=a b"], "pack", ["--output=a b"]),
        (["encode", "--output=a"], "encode", ["--output=a"]),
    ],
)
def test_an_array_runs_a_command_that_takes_shares(given, module, passed):
    command = ("bash", "launch/sweep.sbatch", *given, "--dry-run")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = shlex.split(result.stdout.splitlines()[-1])
    assert said[said.index("-m") :] == ["-m", f"music_jax.{module}", "--worker=0/1", *passed]


@pytest.mark.parametrize(
    ("least", "most", "count"), [("1", "8", "8"), ("0", "6", "4"), ("3", "3", "1")]
)
def test_an_array_with_gaps_is_refused(least, most, count):
    array = {"SLURM_ARRAY_TASK_MIN": least, "SLURM_ARRAY_TASK_MAX": most}
    array |= {"SLURM_ARRAY_TASK_COUNT": count, "SLURM_ARRAY_TASK_ID": most}
    command = ("bash", "launch/sweep.sbatch", "--dry-run")
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | array, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "number its members from 0 without gaps" in result.stderr


def test_a_script_of_slurm_names_the_directory_that_is_not_a_clone(tmp_path):
    copy = shutil.copy(ROOT / "launch/slurm.sbatch", tmp_path / "slurm_script")
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    result = subprocess.run(["bash", copy], env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"{tmp_path} is not a clone of music_jax" in result.stderr


def test_skypilot_recovers_from_a_stop_and_from_nothing_else():
    # SkyPilot's own schema is in a package too large for here; these are the fields it has.
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    known = {"name", "workdir", "envs", "resources", "file_mounts", "setup", "run"}
    assert task.keys() == known
    assert task["resources"].keys() == {"use_spot", "any_of", "job_recovery"}
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    for choice in task["resources"]["any_of"]:
        assert choice.keys() <= {"infra", "accelerators", "accelerator_args"}
    for mount in task["file_mounts"].values():  # SkyPilot refuses to mount a part of a bucket
        assert mount["source"].count("/") == 2
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("gpu", "nodes", "expected"),
    [
        (False, 4, []),
        (True, 1, []),
        (
            True,
            2,
            ["--coordinator_address=10.0.0.1:8476", "--num_processes=2", "--process_id=1"],
        ),
    ],
)
def test_skypilot_passes_the_addresses_of_gpu_nodes(tmp_path, gpu, nodes, expected):
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    (tmp_path / "launch").mkdir()
    for path, body in (
        ("nvidia-smi", f"exit {int(not gpu)}"),
        ("launch/local.sh", 'printf "%s\\n" "$ACCELERATOR" "$@"'),
    ):
        (tmp_path / path).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / path).chmod(0o755)
    environment = task["envs"] | {"BUCKET": "b", "RUN": "r", "ARGUMENTS": "--config.seed=1"}
    environment |= {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": "1"}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    output = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert output[0] == ("cuda13" if gpu else "tpu")
    assert output[1:4] == [
        "--config=configs/imagenet.py",
        "--config.dataset.data_dir=/bucket/datasets",
        "--workdir=gs://b/runs/r",
    ]
    assert output[4:] == ["--config.seed=1", *expected]


@pytest.mark.parametrize("page", ["launch/README.md", "docs/how_to/tpu_pod.md"])
def test_examples_of_the_launchers_name_the_location_of_the_images(page):
    text = (ROOT / page).read_text().replace("BUCKET", "bucket")
    lines = text.replace("\\\n", " ").splitlines()
    starts = ("launch/tpu_vm.sh train", "launch/gke.py", "launch/xpk.sh", "sbatch --nodes")
    examples = [line.split() for line in lines if line.strip().startswith(starts)]
    assert examples
    for command, *arguments in examples:
        assert any(argument.startswith("--config.dataset.") for argument in arguments)
        if command != "sbatch":
            result = launch(command.removeprefix("launch/"), *with_dry_run(arguments))
            assert result.returncode == 0, result.stderr
            assert any(argument.startswith(("--images", "--storage")) for argument in arguments)


def with_dry_run(arguments):
    end = arguments.index("--")
    return [*arguments[:end], "--dry-run", *arguments[end:]]


def test_image_copies_only_what_is_there_and_starts_the_trainer():
    lines = (ROOT / "launch/Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert set(copied) == {"requirements.txt", "LICENSE", "README.md", "configs", "music_jax"}
    assert all((ROOT / name).exists() for name in copied)
    assert "USER 1000" in lines
    assert lines[-1] == 'ENTRYPOINT ["python", "-m", "music_jax.main"]'
