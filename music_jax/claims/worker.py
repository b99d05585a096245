"""A worker: runs the cells that it is told of on its standard input, one line each.

It answers each with a line on its standard output. When its input ends, as it does when the sweep
is stopped or killed, it ends at once.
"""

import json
import os
import queue
import sys
import threading
import traceback
from typing import Any


def main() -> None:
    """Reads tasks until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    setup = json.loads(sys.stdin.readline())
    if setup["core"] is not None:
        os.sched_setaffinity(0, {setup["core"]})

    tasks: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()

    import jax

    if setup["core"] is not None:
        jax.config.update("jax_num_cpu_devices", 1)

    from music_jax.claims.run_cell import CellTask, run_cell
    from music_jax.workdir.user_directories import use_compilation_cache

    use_compilation_cache()
    while True:
        task = tasks.get()
        answer: dict[str, str | None] = {"error": None}
        try:
            run_cell(CellTask(**task))
        except Exception as error:
            traceback.print_exc()
            answer["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _read(tasks: "queue.Queue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main()
