"""Running one cell: training by the project's own step, then measuring."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.claims import measure as measuring
from music_jax.claims.cells import result_file
from music_jax.claims.measure import Outputs
from music_jax.config import from_json, validate
from music_jax.data import datasets
from music_jax.data.augment import normalize_images
from music_jax.data.crops import Crop
from music_jax.data.decode import decode
from music_jax.data.loader import TrainingOrder, training_batches
from music_jax.data.sources import Source, open_source
from music_jax.distributed.mesh import batch_sharding, local_positions, make_data_mesh, to_devices
from music_jax.errors import DivergedError, UndecodableError, UnusableDataError
from music_jax.evaluation.features import extract_split
from music_jax.train import guards, train_and_evaluate
from music_jax.train.recipe import OPTIMIZERS, make_recipe, make_schedule
from music_jax.train.state import TrainState, abstract_state, initial_state, state_shardings
from music_jax.train.step import training_step
from music_jax.workdir import records
from music_jax.workdir.json_files import read_json

# Programs are the same whatever these are: seed and learning rate are arguments of theirs.
_ANY = {
    "seed": 0,
    "optimizer.base_learning_rate": 1.0,
    "dataset.train_split": "",
    "dataset.test_split": "",
    "evaluation.train": "",
    "evaluation.test": "",
}
_SAMPLE = 50_000  # images of a split, of a dataset that does not fit into memory


@dataclasses.dataclass(frozen=True)
class CellTask:
    """What a worker is told about a cell.

    Attributes:
      directory: where its files go.
      config: what it trains, as JSON.
      searching: whether it is for the learning rate alone.
      collapsed_start: whether invariance alone is trained for first; only with `in_memory`.
      in_memory: as in `Settings`.
    """

    directory: str
    config: dict[str, Any]
    searching: bool
    collapsed_start: bool
    in_memory: bool


def run_cell(task: CellTask) -> None:
    """Trains, measures and writes result.json, which is there once everything is done."""
    started, cpu_started = time.monotonic(), time.process_time()
    config = from_json(task.config)
    validate(config)
    directory = records.open_workdir(task.directory)
    result: dict[str, Any] = {"learning_rate": config.optimizer.base_learning_rate}
    try:
        if task.in_memory:
            records.write_config(directory, config)
            state, start = _train(config, directory, task.collapsed_start)
            result |= {"start": start, "train_seconds": time.monotonic() - started}
            result |= _measure(config, directory, state, searching=task.searching)
        else:
            state = train_and_evaluate(config, task.directory)
            result["train_seconds"] = time.monotonic() - started
            result |= _measure_run(config, directory, state, searching=task.searching)
    except DivergedError as error:
        result["diverged"] = str(error)
    result["seconds"] = time.monotonic() - started
    result["core_seconds"] = time.process_time() - cpu_started
    records.write_json(result_file(directory), result)


@functools.lru_cache(maxsize=8)
def _in_memory(dataset_json: str, split: str) -> tuple[Source, dict[str, np.ndarray]]:
    """A split decoded once, and each of its label features.

    Raises:
      UnusableDataError: an image is damaged; a cell trains on all of them or not at all.
    """
    dataset = config_dict.ConfigDict(json.loads(dataset_json))
    source = open_source(dataset, split)
    found, labels = [], []
    for index in range(len(source)):
        try:
            encoded, label = source.example(index)
            image = decode(encoded, dataset.num_channels)
        except UndecodableError as error:
            name = source.record_name(index)
            raise UnusableDataError(f"image {name} of {source.name}: {error}") from error
        if dataset.num_channels == 3:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        # As a bitmap, which is decoded at no cost; crops are cut as in any other run.
        found.append({"image": cv2.imencode(".bmp", image)[1].tobytes(), "label": label})
        record = source.records[index]
        labels.append({k: int(v) for k, v in record.items() if np.ndim(v) == 0 and _is_int(v)})
    names = [dataset.label_key, *(key for key in labels[0] if key != dataset.label_key)]
    columns = {name: np.array([row[name] for row in labels]) for name in names}
    distinct = {  # `label` may be one of the others under another name
        name: column
        for i, (name, column) in enumerate(columns.items())
        if not any(np.array_equal(column, columns[other]) for other in names[:i])
    }
    source = dataclasses.replace(source, records=found, image_key="image", label_key="label")
    return source, distinct


def _is_int(value: Any) -> bool:
    return np.issubdtype(np.asarray(value).dtype, np.integer)


def _source(config: config_dict.ConfigDict, split: str) -> tuple[Source, dict[str, np.ndarray]]:
    return _in_memory(json.dumps(config.dataset.to_dict(), sort_keys=True), split)


@dataclasses.dataclass(frozen=True)
class _Programs:
    init: Callable[[jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    outputs: Callable[..., dict[str, jax.Array]]  # features and embeddings


@functools.lru_cache(maxsize=4)
def _programs(config_json: str) -> _Programs:
    """The initial state and the step, for all seeds, learning rates and splits of a config."""
    config = from_json(json.loads(config_json))
    mesh = make_data_mesh()
    recipe = make_recipe(config, 1)

    def step(
        state: TrainState, images: jax.Array, index: jax.Array, seed: jax.Array, rate: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def schedule(_: Any) -> jax.Array:
            return rate

        own = dataclasses.replace(
            recipe,
            seed=seed,
            schedule=schedule,
            optimizer=OPTIMIZERS[config.optimizer.name](schedule, config.optimizer),
        )
        return training_step(state, images, index, recipe=own, mesh=mesh)

    states = state_shardings(abstract_state(config, recipe.optimizer), mesh)
    batch, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def outputs(params: Any, batch_stats: Any, images: jax.Array) -> dict[str, jax.Array]:
        x = normalize_images(images, mean=recipe.mean, std=recipe.std, dtype=recipe.dtype)
        found = recipe.network.infer(params, batch_stats, x)
        names = ("features", "embeddings")
        return {name: y.astype(jnp.float32) for name, y in zip(names, found, strict=True)}

    return _Programs(
        init=jax.jit(
            functools.partial(initial_state, config, recipe.optimizer), out_shardings=states
        ),
        step=jax.jit(
            step,
            in_shardings=(states, batch, batch, whole, whole),
            out_shardings=(states, whole),
            donate_argnums=0,
        ),
        outputs=jax.jit(outputs),
    )


def _for_any(config: config_dict.ConfigDict, **fields: Any) -> str:
    config = config_dict.ConfigDict(config.to_dict())
    config.update_from_flattened_dict(_ANY | fields)
    return json.dumps(records.as_json(config), sort_keys=True)


def _train(
    config: config_dict.ConfigDict, directory: epath.Path, collapsed_start: bool
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state after training, and what a collapsed start was measured to be."""
    state, start = None, None
    if collapsed_start:
        weights = {f"objective.{term}_weight": 0.0 for term in ("diagonal", "cross_segment")}
        state = _train_once(config, directory / "start", None, weights)
        start = _measure(config, directory, state)
    return _train_once(config, directory, state, {}), start


def _train_once(
    config: config_dict.ConfigDict,
    directory: epath.Path,
    start: TrainState | None,
    changes: dict[str, Any],
) -> TrainState:
    directory.mkdir(parents=True, exist_ok=True)
    mesh = make_data_mesh()
    source, _ = _source(config, config.dataset.train_split)
    order = TrainingOrder(len(source), config.batch_size, config.seed)
    num_steps = config.num_epochs * order.steps_per_epoch
    programs = _programs(_for_any(config, **changes))
    state = programs.init(jax.random.key(config.seed))
    if start is not None:
        state = dataclasses.replace(state, params=start.params, batch_stats=start.batch_stats)
    batches = training_batches(
        source,
        order,
        crop=Crop(config.crop.size, tuple(config.crop.scale), tuple(config.crop.aspect_ratio)),
        channels=config.dataset.num_channels,
        positions=local_positions(config.batch_size, mesh),
        num_steps=num_steps,
        num_threads=config.num_decode_threads,
    )
    seed = jnp.asarray(config.seed, np.uint32)
    rates = np.asarray(make_schedule(config, order.steps_per_epoch)(np.arange(num_steps)))
    log = records.MetricsLog(directory, 0)
    with jax.set_mesh(mesh):
        for step, batch in enumerate(batches, start=1):
            images = to_devices(batch["images"], config.batch_size, mesh)
            index = to_devices(batch["sample_index"], config.batch_size, mesh)
            state, metrics = programs.step(state, images, index, seed, rates[step - 1])
            if step % order.steps_per_epoch == 0:
                scalars = {name: float(value) for name, value in metrics.items()}
                log.write({"step": step, "epoch": step / order.steps_per_epoch, **scalars})
                if guards.read_trip(state.guard) is not None:
                    log.close()
                    raise DivergedError(f"by step {step} of {num_steps}")
    log.close()
    return state


def _measure(
    config: config_dict.ConfigDict,
    directory: epath.Path,
    state: TrainState,
    *,
    searching: bool = False,
) -> dict[str, Any]:
    """The measures of a cell whose images are in memory."""
    splits = (config.dataset.train_split, config.dataset.test_split)
    train, test = (_extract(config, directory, state, *_source(config, split)) for split in splits)
    result: dict[str, Any] = {"linear_top1": measuring.linear_top1(train, test, config)}
    if not searching:
        result |= measuring.measure(train, test, config)
        if len(train.labels) > 1:
            result |= measuring.measure_factors(train, test, config)
    return result


def _measure_run(
    config: config_dict.ConfigDict, directory: epath.Path, state: TrainState, *, searching: bool
) -> dict[str, Any]:
    """The measures of a cell that was a run: its probe and kNN, and of a sample all else."""
    result: dict[str, Any] = {}
    if not searching:
        probed = datasets.evaluation_sources(config)
        outputs = []
        for source in probed:
            rng = np.random.Generator(np.random.Philox(key=[config.seed, _SAMPLE]))
            rows = np.sort(rng.permutation(len(source))[:_SAMPLE])
            outputs.append(_extract(config, directory, state, source.subset(rows), None))
        train, test = outputs
        result = measuring.measure(train, test, config)
    for file, name in (("linear_eval.json", "linear_top1"), ("knn.json", "knn_top1")):
        if (directory / file).exists():
            result[name] = read_json(directory / file)["top1"]
    return result


def _extract(
    config: config_dict.ConfigDict,
    directory: epath.Path,
    state: TrainState,
    source: Source,
    labels: dict[str, np.ndarray] | None,
) -> Outputs:
    programs = _programs(_for_any(config))
    found = extract_split(
        functools.partial(programs.outputs, state.params, state.batch_stats),
        source,
        config,
        make_data_mesh(),
        skipped=records.open_skipped(directory, config),
        description="features",
    )
    if not np.all(np.isfinite(found.features)):
        raise DivergedError("the features are not finite")
    labeled = found.labeled()
    if labels is None:
        columns = {config.dataset.label_key: labeled.labels}
    else:
        columns = {name: column[labeled.indices] for name, column in labels.items()}
    return Outputs(labeled.features, labeled.arrays["embeddings"], columns)
