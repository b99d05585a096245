"""Measures the peak memory of `pack` and `encode` over many small files, killed and resumed.

    python tests/benchmarks/shares.py                             10,000 and 100,000 files
    python tests/benchmarks/shares.py --files 1000000 --workers=2 --commands pack

Each command runs as `--workers` processes side by side, all of which are killed (SIGKILL) once a
third of the output is there and started again. Prints a line for each number of files: the seconds
and images per second of the second start, and the largest peak (VmHWM) of any process.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

_FILES_PER_FOLDER, _LINKS = 10_000, 10_000  # file systems limit the links to a file


def write_files(folder: pathlib.Path, count: int) -> None:
    """Writes gray images of 28 x 28 pixels; most are hard links to others."""
    import cv2
    from philox_weights import philox_images

    for i in range(count):
        path = folder / f"class {i // _FILES_PER_FOLDER % 10}" / f"{i:07d}.png"
        if i % _FILES_PER_FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        if i % _LINKS == 0:
            content = cv2.imencode(".png", philox_images(1, 28, 1)[0])[1].tobytes()
            first = path
            path.write_bytes(content)
        else:
            os.link(first, path)


def peak(process: subprocess.Popen) -> int:
    """Returns the peak memory of a process in kB; 0 if it has ended."""
    try:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) if lines else 0


def run(
    arguments: list[str], workers: int, output: pathlib.Path, parts: str, until: int
) -> tuple[float, int]:
    """Runs the workers, until that many parts exist; returns seconds and the largest peak in kB."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    began, largest = time.monotonic(), 0
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *arguments, f"--worker={i}/{workers}"],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for i in range(workers)
    ]
    while any(process.poll() is None for process in processes):
        largest = max(largest, *map(peak, processes))
        if until and len(list(output.parent.glob(parts))) >= until:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
            return time.monotonic() - began, largest
        time.sleep(0.05)
    if any(process.returncode for process in processes):
        raise SystemExit(f"{arguments[0]} failed")
    return time.monotonic() - began, largest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--commands", nargs="+", default=["pack", "encode"])
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from small_runs import save_run, small_config

    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        save_run(root / "run", small_config())
        print("command  files      s       img/s   peak MB  killed at s", flush=True)
        for count in given.files:
            write_files(root / f"{count}", count)
            for command in given.commands:
                output = root / f"{command}-{count}" / "out.npy"
                output.parent.mkdir()
                arguments = [f"music_jax.{command}", f"--output={output}"]
                if command == "pack":
                    arguments += [f"--source={root / str(count)}", "--shard_size=1024"]
                    parts = "out.npy/images-*"
                else:
                    arguments += [f"--images={root / str(count)}", f"--workdir={root / 'run'}"]
                    parts = "out.npy.parts/*/*.npz"
                runs = (arguments, given.workers, output, parts)
                killed, first = run(*runs, until=count // 1024 // 3 + 1)
                seconds, second = run(*runs, until=0)
                print(
                    f"{command:8} {count:<10,} {seconds:<7.1f} {count * 2 / 3 / seconds:<7.0f} "
                    f"{max(first, second) / 1e3:<8.0f} {killed:.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
