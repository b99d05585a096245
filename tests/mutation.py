"""Mutation testing: changes the code at one position at a time and checks that a test fails.

    pip install --no-deps --target=/tmp/mutation cosmic-ray parso
    export PYTHONPATH=/tmp/mutation
    python tests/mutation.py music_jax/optim.py music_jax/objectives --sample=40 --seed=0

The changes are those of cosmic-ray's operators, without those that change nothing but docstrings,
annotations, errors' messages or what is logged. Each is tried in a process that is forked after the
libraries were imported and before JAX starts a backend: pytest runs the tests nearest to the module
(`tests/PACKAGE/test_MODULE*.py` and those in `NEAREST`, without slow ones) until the first failure.
A mutant is killed if a test fails, if the tests take too long or if they end the process.

Results are appended to a file of JSON lines. Run again, the same command tries what is missing, and
with --survivors also what survived before.
"""

import argparse
import ast
import concurrent.futures
import difflib
import functools
import hashlib
import importlib.abc
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
import warnings

LIBRARIES = ("cv2", "flax.nnx", "grain", "jax", "ml_collections", "optax", "orbax.checkpoint")
LIBRARIES += ("pytest", "scipy.stats", "sklearn.cluster")
ROOT = pathlib.Path(__file__).parents[1]
# Which other tests are near to a module. Quick ones first: the first failure ends a trial.
NEAREST = {
    "claims/budget": ("claims/test_planning.py",),
    "claims/cells": ("claims/test_planning.py", "claims/test_tables.py"),
    "claims/measure": ("claims/test_run_cells.py",),
    "claims/references": ("claims/test_run_cells.py",),
    "claims/report": ("claims/test_tables.py",),
    "claims/run_cells": ("claims/test_command.py",),
    "claims/search": ("claims/test_planning.py",),
    "claims/sweep": ("claims/test_planning.py",),
    "claims/__main__": ("claims/test_command.py",),
    "data/registered": ("test_registry.py",),
    "data/augment": ("data/test_augment_types.py", "data/test_transforms.py"),
    "evaluation/feature_protocols": ("evaluation", "train/test_every_field.py"),
    "evaluation/features": ("evaluation/test_run.py", "evaluation/test_protocols.py"),
    "evaluation/finetune": ("evaluation", "train/test_every_field.py"),
    "evaluation/protocols": ("evaluation/test_run.py", "test_evaluate.py"),
    "evaluation/results": ("evaluation/test_multi_label.py", "workdir/test_files.py"),
    "metrics/few_shot": ("metrics/test_extremes.py",),
    "metrics/knn": ("metrics/test_extremes.py",),
    "metrics/label_free": ("metrics/test_extremes.py",),
    "metrics/linear_probe": ("metrics/test_extremes.py",),
    "metrics/segments": ("metrics/test_extremes.py",),
    "objectives/cross_segment": ("objectives/test_global_batch.py",),
    "objectives/baselines": ("objectives/test_global_batch.py",),
    "objectives/probabilities": ("objectives/test_cross_segment.py",),
    "train/step": ("train/test_state.py",),
}
# Expressions and statements that hold messages alone.
MESSAGES = ("progress.say", "progress.log_lines", "_logger.", "warnings.warn")


def modules(paths: list[str]) -> list[pathlib.Path]:
    found = []
    for path in map(pathlib.Path, paths):
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [path.resolve().relative_to(ROOT) for path in found]


def nearest_tests(module: pathlib.Path) -> list[str]:
    """The test files of a module, or all of its package if there are none."""
    inside = module.relative_to("music_jax")
    folder = ROOT / "tests" / inside.parent
    more = [ROOT / "tests" / name for name in NEAREST.get(str(inside.with_suffix("")), ())]
    tests = sorted(folder.glob(f"test_{inside.stem}.py")) or sorted(
        folder.glob(f"test_{inside.stem}_*.py")
    )
    tests += [path for path in more if path not in tests]
    return [str(path) for path in tests or [folder]]


class _WithoutMessages(ast.NodeTransformer):
    """Removes code that has no effect except on the text of messages."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        node.annotation = ast.Constant(None)
        return node

    def visit_Raise(self, node):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(exc=raised, cause=None)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Constant):
            return None
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith(MESSAGES):
            return None
        return self.generic_visit(node)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_If(self, node):
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


@functools.lru_cache(16)
def _effect(source: str) -> str | None:
    """Returns the part of a source that is compared; None if it does not compile."""
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(source, "mutant", "exec")
        return ast.dump(_WithoutMessages().visit(ast.parse(source)))
    except SyntaxError:
        return None


@functools.cache
def _operators() -> dict:
    from cosmic_ray.operators import provider

    left_out = ("NoOp", "Variable")  # changes nothing; needs arguments
    compares_identity = re.compile("ReplaceComparisonOperator_(?!Is).*_Is")  # of values: no slip
    return {
        name: operator()
        for name, operator in provider._OPERATORS.items()
        if not name.startswith(left_out) and not compares_identity.match(name)
    }


def places(module: pathlib.Path) -> list[tuple[pathlib.Path, int, str, int]]:
    """Where a module can be changed: the syntax node's number, the operator and its variant."""
    import parso
    from cosmic_ray.ast import ast_nodes

    tree = parso.parse((ROOT / module).read_text())
    operators = _operators()
    return [
        (module, number, name, variant)
        for number, node in enumerate(ast_nodes(tree))
        for name, operator in operators.items()
        for variant, _ in enumerate(operator.mutation_positions(node))
    ]


def mutate(module: pathlib.Path, number: int, name: str, variant: int) -> dict | None:
    """Returns the mutant of a position; None if no test should detect the change."""
    import parso
    from cosmic_ray.ast import ast_nodes

    source = (ROOT / module).read_text()
    tree = parso.parse(source)
    node = next(itertools.islice(ast_nodes(tree), number, None))
    line, parent = node.start_pos[0], node.parent
    new = _operators()[name].mutate(node, variant)
    if new is not node:
        at = next(i for i, child in enumerate(parent.children) if child is node)
        parent.children[at : at + 1] = [] if new is None else [new]
    code = tree.get_code()
    if _effect(code) in (None, _effect(source)):
        return None
    changed = difflib.ndiff(source.splitlines(), code.splitlines())
    return {
        "module": str(module),
        "line": line,
        "change": "  ".join(text for text in changed if text.startswith(("- ", "+ "))),
        "id": hashlib.sha256(f"{module}\n{code}".encode()).hexdigest()[:16],
        "source": code,
    }


def sample(path: str, count: int | None, seed: int) -> list[dict]:
    """So many mutants of a path, drawn at random; all for None."""
    found: dict[str, dict] = {}
    drawn = [place for module in modules([path]) for place in places(module)]
    random.Random(seed).shuffle(drawn)
    for place in drawn:
        if len(found) == count:
            break
        mutant = mutate(*place)
        if mutant is not None:
            found[mutant["id"]] = mutant
    return list(found.values())


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a source of its own."""

    def __init__(self, module: pathlib.Path, source: str):
        parts = module.with_suffix("").parts
        self._name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self._path, self._source = ROOT / module, source

    def find_spec(self, name, path=None, target=None):
        if name != self._name:
            return None
        folders = [str(self._path.parent)] if self._path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, self._path, loader=self, submodule_search_locations=folders
        )

    def exec_module(self, module):
        exec(compile(self._source, str(self._path), "exec"), module.__dict__)


def _prepare() -> None:
    """What tests/conftest.py sets, before the libraries are imported, and then these."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    cache = ROOT / "build" / "tests" / "compilation_cache"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)
    for name in LIBRARIES:
        importlib.import_module(name)


def _child(mutant: dict, directory: str) -> None:
    """Runs the nearest tests and ends the process with pytest's exit code."""
    os.setsid()
    sink = os.open(os.path.join(directory, "output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.environ["TMPDIR"] = tempfile.tempdir = directory
    sys.meta_path.insert(0, _Mutated(pathlib.Path(mutant["module"]), mutant["source"]))
    import pytest

    code = 3
    try:
        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line"]
        tests = nearest_tests(pathlib.Path(mutant["module"]))
        code = pytest.main([*options, "-m", "not slow and not browser", *tests])
    finally:
        sys.stdout.flush()
        os._exit(int(code))


def trial(mutant: dict, limit: float) -> dict:
    """Returns whether the nearest tests detect a mutant, and their time."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        pid = os.fork()
        if pid == 0:
            _child(mutant, directory)
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() - began > limit:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ended = (pid, None)
                break
            time.sleep(0.05)
        output = pathlib.Path(directory, "output").read_text(errors="replace")
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    code = None if ended[1] is None else os.waitstatus_to_exitcode(ended[1])
    return {k: v for k, v in mutant.items() if k != "source"} | {
        "outcome": "survived" if code == 0 else "timeout" if code is None else "killed",
        "by": failed[0][:200] if failed else f"exit code {code}",
        "seconds": round(time.monotonic() - began, 1),
    }


def _read(path: pathlib.Path) -> dict[str, dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["id"]: record for record in map(json.loads, lines)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="modules or packages, such as music_jax/optim.py")
    parser.add_argument("--sample", type=int, help="mutants of each path; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "build" / "mutation.jsonl")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--survivors", action="store_true", help="try survivors again")
    options = parser.parse_args()

    chosen = {path: sample(path, options.sample, options.seed) for path in options.paths}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    done = _read(options.results)
    again = ("survived",) if options.survivors else ()
    todo = [
        mutant
        for found in chosen.values()
        for mutant in found
        if mutant["id"] not in done or done[mutant["id"]]["outcome"] in again
    ]
    with concurrent.futures.ProcessPoolExecutor(
        options.workers, multiprocessing.get_context("spawn"), _prepare
    ) as pool:
        originals = {
            m["module"]: m | {"id": "original", "source": (ROOT / m["module"]).read_text()}
            for m in todo
        }
        whole = pool.map(trial, originals.values(), [600.0] * len(originals))
        limits = {}
        for result in whole:
            if result["outcome"] != "survived":
                raise SystemExit(f"{result['module']} fails as it is: {result['by']}")
            limits[result["module"]] = 20 + 3 * result["seconds"]
            print(f"{result['module']}: {result['seconds']} s without a change", flush=True)
        running = [pool.submit(trial, mutant, limits[mutant["module"]]) for mutant in todo]
        for future in concurrent.futures.as_completed(running):
            result = future.result()
            done[result["id"]] = result
            with options.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            if result["outcome"] == "survived":
                print(
                    f"survived: {result['module']}:{result['line']}  {result['change']}", flush=True
                )

    for path, found in chosen.items():
        results = [done[mutant["id"]] for mutant in found]
        alive = [r for r in results if r["outcome"] == "survived"]
        seconds = sum(r["seconds"] for r in results) / max(1, len(results))
        print(f"{path}: {len(results) - len(alive)} of {len(results)} killed, {seconds:.1f} s each")
        for result in sorted(alive, key=lambda r: (r["module"], r["line"])):
            print(f"  {result['module']}:{result['line']}  {result['change']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
