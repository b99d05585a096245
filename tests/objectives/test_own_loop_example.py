"""The examples of a training loop run unchanged and learn; sharded arrays shard the objective."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

_ROOT = pathlib.Path(__file__).parents[2]


def run_example(page, heading, names):
    section = (_ROOT / page).read_text(encoding="utf-8").partition(heading)[2]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    with jax.numpy_dtype_promotion("standard"):  # optax.adam promotes
        exec(compile(example, page, "exec"), names)
    return names


def run_loop():
    return run_example("docs/reference/objectives.md", "## In your own training loop", {})


def test_the_loss_of_the_readme_reaches_the_minimum_that_it_names():
    heading = "### Use the loss in your own loop"
    names = run_example("README.md", heading, {"embed": lambda params, x: params * x})
    # Random units: certain, the same in both views, and independent up to chance.
    units = jax.random.randint(jax.random.key(0), (2048, 64), 0, 8)
    codes = jax.nn.one_hot(units, 8).reshape(2048, 512)
    loss, gradient = jax.value_and_grad(names["loss_fn"])(100.0, codes, codes)
    assert -3 * math.log(8) < loss < -3 * math.log(8) + 0.1
    assert jnp.isfinite(gradient)


def test_the_example_learns(capsys):
    run_loop()
    loss, bound = map(float, re.findall(r"-\d+\.\d+", capsys.readouterr().out))
    assert bound == -6.24
    assert bound <= loss < 0.8 * bound


def test_the_example_takes_sharded_arrays():
    names = run_loop()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    views = jax.device_put(names["views"], NamedSharding(mesh, P("data")))
    params, opt_state = jax.device_put(
        (names["params"], names["opt_state"]), NamedSharding(mesh, P())
    )
    with jax.numpy_dtype_promotion("standard"):
        step = names["train_step"].lower(params, opt_state, views)
    assert "all-to-all" in step.compile().as_text()
