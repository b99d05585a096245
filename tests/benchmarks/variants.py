"""Compares variants of MUSIC with each other on validation images of Fashion-MNIST or `shapes`.

    python tests/benchmarks/variants.py --output=variants.jsonl
    python tests/benchmarks/variants.py --output=shapes.jsonl --config=shapes --epochs=8 \\
        --images=3200 --rate=0.01 --units=16 --variants=music,contrast,simclr,simclr_1

Every variant of MUSIC changes one thing, but for `standardized`, which also has temperature 0.5;
other objectives stand beside them. `average` measures an exponential moving average of the weights
and running statistics, with decay 0.99 per step. `contrast` adds the loss of SimCLR with
temperature 0.1 for the probabilities of all units, less 1 / K. Seeds are paired: the same order of
images and the same augmentations. A line of JSON for each training, which is not repeated when the
command is rerun, then the mean difference of each variant from plain MUSIC with a 95 % t-interval.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from music_jax.claims.measure import pair_information
from music_jax.claims.probe import logistic_probe
from music_jax.claims.references import samples
from music_jax.config import from_file
from music_jax.evaluation.run import load_run
from music_jax.metrics.knn import knn_predict
from music_jax.objectives import music_terms, simclr_loss
from music_jax.train import loop, step, train_and_evaluate
from music_jax.train.recipe import Recipe

VALIDATION = {"fashion_mnist": "train[50000:]", "shapes": "train[80%:]"}
VARIANTS: dict[str, dict] = {
    "music": {},
    "cross_1.25": {"objective.cross_segment_weight": 1.25},
    "cross_2": {"objective.cross_segment_weight": 2.0},
    "cross_4": {"objective.cross_segment_weight": 4.0},
    "temperature_0.5": {"objective.temperature": 0.5},
    "temperature_0.25": {"objective.temperature": 0.25},
    "centered": {"objective.center": True},
    "cross_4_to_1": {},
    "temperature_0.25_to_1": {},
    "temperature_1_to_0.25": {},
    "standardized": {},
    "average": {},
    "vicreg": {"objective.name": "vicreg"},
    "simclr": {"objective.name": "simclr", "objective.contrast_temperature": 0.2},
    "simclr_0.1": {"objective.name": "simclr", "objective.contrast_temperature": 0.1},
    "simclr_0.5": {"objective.name": "simclr", "objective.contrast_temperature": 0.5},
    "simclr_1": {"objective.name": "simclr", "objective.contrast_temperature": 1.0},
    "contrast": {},
}
# Cross-segment weight and temperature by the share of the training that has passed.
SCHEDULES: dict[str, Callable] = {
    "cross_4_to_1": lambda passed: (4.0 ** (1 - passed), 1.0),
    "temperature_0.25_to_1": lambda passed: (1.0, 0.25 ** (1 - passed)),
    "temperature_1_to_0.25": lambda passed: (1.0, 0.25**passed),
    "standardized": lambda passed: (1.0, 0.5),
    "contrast": lambda passed: (1.0, 1.0),
}


def schedule(name, config, steps):
    """Replaces the objective of a recipe by one that depends on the step."""

    segments = config.objective.num_segments

    def deviations(embeddings):
        p = jax.nn.softmax(embeddings.reshape(len(embeddings), segments, -1))
        return (p - 1 / p.shape[2]).reshape(len(embeddings), -1)

    def of_step(recipe, number):
        weight, temperature = SCHEDULES[name](jnp.minimum(number / steps, 1.0))

        def objective(a, b):
            if name == "standardized":  # each embedding has mean 0 and variance 1 in the batch
                a, b = (jax.nn.standardize(x, axis=0, epsilon=1e-5) for x in (a, b))
            terms = music_terms(a, b, num_segments=segments, temperature=temperature)
            loss = terms.diagonal + weight * terms.cross_segment + terms.invariance
            if name == "contrast":
                loss += simclr_loss(*map(deviations, (a, b)), temperature=0.1)
            return loss, {}

        return objective

    return of_step


def averaging(compiled, found, decay=0.99):
    """Wraps `compile_step` to keep an average of the weights and statistics in `found`."""

    @jax.jit
    def mix(old, new):
        return jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, old, new)

    def compile_step(*arguments):
        take = compiled(*arguments)

        def step(state, *batch):
            state, metrics = take(state, *batch)
            new = {"params": state.params, "batch_stats": state.batch_stats}
            # A step donates its state, so the first average is a copy of it.
            found.update(mix(found, new) if found else jax.tree.map(jnp.copy, new))
            return state, metrics

        return step

    return compile_step


def train(name, seed, given):
    """Returns accuracies and what the segments share after one training."""
    config = from_file(given.config)
    config.seed, config.num_epochs = seed, given.epochs
    if given.config == "shapes":  # its network and warm-up are for longer trainings
        config.backbone.name = "tiny_resnet"
        config.optimizer.warmup_epochs = 1
    config.dataset.train_split = f"train[:{given.images}]"
    config.dataset.test_split = ""
    config.optimizer.base_learning_rate = given.rate
    config.objective.num_segments = 512 // given.units
    config.objective.units_per_segment = given.units
    config.projector.output_size = None
    config.update_from_flattened_dict(VARIANTS[name])
    if config.objective.name != "music":
        config.projector.output_size = 512
    steps = given.images // config.batch_size * given.epochs
    of_step = schedule(name, config, steps) if name in SCHEDULES else ORIGINAL
    if Recipe.objective_of_step is not of_step:
        Recipe.objective_of_step = of_step
        step._jit_shared_step.cache_clear()  # whose key does not know the replaced objective
    average = {}
    loop.compile_step = averaging(COMPILE, average) if name == "average" else COMPILE
    with tempfile.TemporaryDirectory() as directory:
        train_and_evaluate(config, directory)
        run = load_run(directory, overrides={"dataset.test_split": VALIDATION[given.config]})
        run = dataclasses.replace(run, **average)
        train_samples, test_samples = samples(run.train("trained")), samples(run.test("trained"))
        found = {"linear": logistic_probe(train_samples, test_samples).validation_top1}
        predicted = knn_predict(*train_samples, test_samples[0], num_classes=10)
        found["knn"] = float(np.mean(predicted == test_samples[1]))
        if config.objective.name == "music" and name != "standardized":
            codes = run.probabilities().argmax(axis=2)
            shared = pair_information(codes, given.units).mean()
            found["shared"] = float(shared / np.log(given.units))
    return found


ORIGINAL, COMPILE = Recipe.objective_of_step, step.compile_step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--config", default="fashion_mnist", choices=VALIDATION)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--epochs", default=5, type=int)
    parser.add_argument("--images", default=20_000, type=int)
    parser.add_argument("--rate", default=0.008, type=float)
    parser.add_argument("--units", default=8, type=int)
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 1)
    rows = []
    if given.output.exists():
        rows = [json.loads(line) for line in given.output.read_text().splitlines()]
    names = ("config", "epochs", "images", "rate", "units")
    setting = {name: getattr(given, name) for name in names}
    for name in given.variants.split(","):
        for seed in range(given.seeds):
            wanted = {"variant": name, "seed": seed, **setting}
            if any(wanted.items() <= row.items() for row in rows):
                continue
            rows.append(wanted | train(name, seed, given))
            with given.output.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    for metric in ("linear", "knn"):
        found = {
            (row["variant"], row["seed"]): row[metric]
            for row in rows
            if setting.items() <= row.items()
        }
        for name in given.variants.split(","):
            seeds = [s for s in range(given.seeds) if (name, s) in found and ("music", s) in found]
            values = np.array([found[name, s] for s in seeds]) * 100
            differences = values - np.array([found["music", s] for s in seeds]) * 100
            half = scipy.stats.sem(differences) * scipy.stats.t.ppf(0.975, len(seeds) - 1)
            print(f"{metric} {name}: {values.mean():.1f}, {differences.mean():+.1f} ± {half:.1f}")


if __name__ == "__main__":
    main()
