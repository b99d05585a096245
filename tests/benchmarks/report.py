"""Measures what `python -m music_jax.report` takes, in processes of their own.

    python tests/benchmarks/report.py runs/mnist5k

The first report compiles its programs, the others read them from the cache. On a machine that does
other work, compare the processor seconds.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time


def _measure(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Returns the seconds and the processor seconds of a report."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "music_jax.report", *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(workdir: str) -> None:
    """Prints a line for each report."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"XDG_CACHE_HOME": directory}
        arguments = [f"--workdir={workdir}", f"--output={directory}/report.html"]
        for name in ("compiled first", "again", "again"):
            seconds, processors = _measure(arguments, environment)
            print(f"{name}: {seconds:.1f} s, {processors:.1f} s of the processors", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
