"""The README's example runs unchanged and learns; sharding its arrays shards the objective."""

import pathlib
import re

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

README = pathlib.Path(__file__).parents[2] / "README.md"


def run_example():
    section = README.read_text(encoding="utf-8").partition("### Use the loss in your own loop")[2]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # optax.adam promotes
        exec(compile(example, "README.md", "exec"), names)
    return names


def test_the_example_learns(capsys):
    run_example()
    loss, bound = map(float, re.findall(r"-\d+\.\d+", capsys.readouterr().out))
    assert bound == -6.24
    assert bound <= loss < 0.8 * bound


def test_the_example_takes_sharded_arrays():
    names = run_example()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    views = jax.device_put(names["views"], NamedSharding(mesh, P("data")))
    params, opt_state = jax.device_put(
        (names["params"], names["opt_state"]), NamedSharding(mesh, P())
    )
    with jax.numpy_dtype_promotion("standard"):
        step = names["train_step"].lower(params, opt_state, views)
    assert "all-to-all" in step.compile().as_text()
