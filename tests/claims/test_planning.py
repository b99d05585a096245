"""The cells of a comparison: their search, their order, their shares and their configs."""

import dataclasses

import faked_claims as faked
import pytest

from music_jax import config as config_lib
from music_jax import registry
from music_jax.claims.budget import BUDGETS, images_of
from music_jax.claims.cells import Cell
from music_jax.claims.methods import BUILT_IN
from music_jax.claims.planning import check_cells, make_plan, missing_cells
from music_jax.claims.run_cells import choose
from music_jax.claims.tables import CLAIMS, make_tables
from music_jax.distributed.shares import Share
from music_jax.errors import UserError
from music_jax.workdir.run_config import as_json

_ALL = tuple(BUILT_IN)
_NAMES = ["fashion_mnist", "mnist5k", "digits", "shapes", "cifar10"]


@pytest.mark.parametrize("name", _NAMES)
def test_every_cell_has_a_valid_config(tmp_path, name):
    sweep = faked.make_sweep(tmp_path, name, methods=_ALL, claims=(1, 2, 3, 4, 5, 6))
    check_cells(sweep)
    cells = make_plan(sweep, assume=True).cells
    assert len({cell.name for cell in cells}) == len(cells) > 100


def test_a_search_trains_its_best_again_with_fresh_seeds(tmp_path):
    sweep = faked.make_sweep(tmp_path, methods=("vicreg",), budget="full")
    rounds = faked.finish_all(sweep)
    first = [cell for cell in rounds[0] if cell.kind == "search"]
    assert len(first) == 24
    assert {(cell.fields["seed"], cell.fields["num_epochs"]) for cell in first} == {(0, 5)}
    again = [cell for cells in rounds for cell in cells if "again" in cell.name]
    assert len({cell.group for cell in again}) == 4
    assert [cell.fields["seed"] for cell in again] == [1, 2] * 4
    finals = [cell for cell in rounds[-1] if cell.kind == "final"]
    assert [cell.fields["seed"] for cell in finals] == [100, 101, 102, 103]
    assert {cell.fields["num_epochs"] for cell in finals} == {20}
    assert finals[0].fields["optimizer.base_learning_rate"] == pytest.approx(8e-3)
    assert finals[0].fields["projector.hidden_sizes"] == ()


def test_the_ranges_of_a_search_are_extended_at_their_ends(tmp_path):
    def accuracy(cell):  # better and better the larger the rate, up to one beyond the range
        return 0.9 - abs(cell.fields["optimizer.base_learning_rate"] - 0.128)

    sweep = faked.make_sweep(tmp_path, methods=("simclr",), budget="full")
    rounds = faked.finish_all(sweep, accuracy=accuracy)
    rates = [{c.fields["optimizer.base_learning_rate"] for c in cells} for cells in rounds[1:4]]
    assert [max(found) for found in rates] == pytest.approx([0.064, 0.128, 0.256])
    (point,) = [point for point in make_plan(sweep).points if point.series == "simclr"]
    assert point.choice["learning_rate"] == pytest.approx(0.128)
    assert "learning_rate" not in point.at_edge
    assert len(point.cells) == 4


def test_an_option_that_is_best_at_the_last_end_is_reported(tmp_path):
    accuracy = lambda cell: cell.fields["optimizer.base_learning_rate"]  # noqa: E731
    sweep = faked.make_sweep(tmp_path, methods=("simclr",))
    faked.finish_all(sweep, accuracy=accuracy)
    assert make_plan(sweep).points[0].at_edge == ("learning_rate", "contrast_temperature")[:1]


def test_a_choice_that_diverges_is_never_the_best(tmp_path):
    sweep = faked.make_sweep(tmp_path, methods=("vicreg",))
    first = missing_cells(sweep)[0]
    sweep.results.write(first, {"core_seconds": 1.0, "diverged": "at step 3"}, {})
    faked.finish_all(sweep, accuracy=lambda cell: 0.2)
    best = make_plan(sweep).points[0].choice
    assert sweep.methods[0].draw(4)[0] != best


def test_a_method_has_the_same_cells_whatever_it_is_compared_with(tmp_path):
    alone = faked.make_sweep(tmp_path / "a", methods=("vicreg",), claims=(1, 2))
    together = faked.make_sweep(tmp_path / "b", methods=_ALL, claims=(1, 2, 3))
    faked.finish_all(alone)
    faked.finish_all(together)
    others = {cell.name: cell for cell in make_plan(together).cells}
    mine = [cell for cell in make_plan(alone).cells]
    assert all(cell == others[cell.name] for cell in mine)
    # So one more method needs only its own cells.
    more = faked.make_sweep(tmp_path / "a", methods=("vicreg", "simclr"), claims=(1,))
    assert {cell.group.split("/")[1] for cell in missing_cells(more)} == {"simclr"}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_divide_the_cells_evenly(tmp_path, count):
    sweep = faked.make_sweep(tmp_path, methods=_ALL, claims=(1, 2, 3, 4, 5, 6), budget="full")
    cells = make_plan(sweep, assume=True).cells
    shares = [[cell for cell in cells if cell.is_in_share(Share(i, count))] for i in range(count)]
    assert sum(map(len, shares)) == len(cells)
    assert max(map(len, shares)) - min(map(len, shares)) < 0.1 * len(cells)


def test_the_peak_grows_with_the_root_of_the_batch_size(tmp_path):
    sweep = faked.make_sweep(tmp_path, methods=("vicreg",), claims=(4,), budget="full")
    faked.finish_all(sweep)
    points = {(p.group, p.x): p for p in make_plan(sweep).points}
    assert {x for _, x in points} == {16, 256, 1024, 4096}
    for (group, size), point in points.items():
        config = sweep.cell_config(point.cells[0])
        peak = config.optimizer.base_learning_rate * size / 256
        assert peak == pytest.approx(point.choice["learning_rate"] * (size / 256) ** 0.5, rel=1e-4)
        seen = config.dataset.train_split
        count = int(seen.removeprefix("train[:").removesuffix("]"))
        steps = config.num_epochs * (count // size)
        warmup = config.optimizer.min_warmup_steps
        if group == "equal steps":
            assert steps == pytest.approx(390, rel=0.02)
            assert config.evaluation.train == "fashion_mnist:train[:50000]"
        else:
            assert (config.num_epochs, count) == (20, 50_000)
        assert warmup == 100
        assert steps > 200
    # A search is five epochs, or as many as have twice the steps of the warm-up.
    searched = {
        cell.fields["batch_size"]: cell.fields["num_epochs"]
        for cell in make_plan(sweep).cells
        if cell.name.startswith("search/batch=") and "steps" not in cell.name
    }
    assert searched == {16: 5, 1024: 5, 4096: 17}


def test_a_dataset_of_a_few_batches_is_compared_at_its_own_size(tmp_path):
    sweep = faked.make_sweep(tmp_path, "digits", methods=("vicreg",), claims=(4,))
    faked.finish_all(sweep)
    assert {point.x for point in make_plan(sweep).points} == {8, 128}
    assert make_tables(sweep)[0]["tests"]


def test_the_expected_cost_does_not_change_much(tmp_path):
    options = {"methods": ("music", "vicreg"), "claims": (1, 2, 3, 4, 5), "budget": "full"}
    sweep = faked.make_sweep(tmp_path, **options)
    before = sum(cell.cost for cell in make_plan(sweep, assume=True).cells)
    faked.finish_all(sweep)
    after = sum(cell.cost for cell in make_plan(sweep).cells)
    assert before == pytest.approx(after, rel=0.1)


def test_depth_and_dimension_are_varied_for_the_better_music_alone(tmp_path):
    def accuracy(cell):
        better = cell.fields.get("objective.center") is True
        return faked.validation_accuracy(cell) + 0.01 * better

    sweep = faked.make_sweep(tmp_path, methods=("music", "music_centered", "vicreg"), claims=(2,))
    assert make_plan(sweep).points == []
    faked.finish_all(sweep, accuracy=accuracy)
    points = make_plan(sweep).points
    assert {point.series for point in points} == {"music_centered", "vicreg"}
    assert [point.x for point in points] == [0, 1, 2, 0, 1, 2]
    for point in points:  # the chosen depth needs no further training
        chosen = make_plan(faked.make_sweep(tmp_path, methods=[point.series])).points[0].choice
        directory = "final" if chosen["depth"] == point.x else f"depth={point.x}"
        assert point.cells[0].group == f"{directory}/{point.series}"
        assert point.choice["depth"] == point.x


def test_a_result_of_other_settings_is_an_error(tmp_path):
    sweep = faked.make_sweep(tmp_path)
    cell = missing_cells(sweep)[0]
    other = dataclasses.replace(cell, fields={**cell.fields, "optimizer.base_learning_rate": 7.0})
    faked.finish(sweep, other)
    with pytest.raises(UserError, match=r"music/00.json is the result of other settings"):
        missing_cells(faked.make_sweep(tmp_path))


def test_results_of_another_config_are_an_error(tmp_path):
    sweep = faked.make_sweep(tmp_path)
    sweep.results.check_config(sweep.config, budget="small")
    config = faked.load("fashion_mnist")
    config.dataset.data_dir = "/elsewhere"  # does not matter
    sweep.results.check_config(config, budget="small")
    with pytest.raises(UserError, match="budget differ"):
        sweep.results.check_config(config, budget="full")
    config.crop.scale = (0.9, 1.0)
    with pytest.raises(UserError, match=r"another config: crop.scale differ"):
        sweep.results.check_config(config, budget="small")


def test_predictions_for_other_test_images_are_an_error(tmp_path):
    sweep = faked.make_sweep(tmp_path)
    finals = [cell for cell in make_plan(sweep, assume=True).cells if cell.kind == "final"]
    faked.finish(sweep, finals[0])
    labels = faked.LABELS[::-1]
    with pytest.raises(UserError, match=r"in another order, than those of .*labels.npz"):
        sweep.results.write(finals[1], {}, {"linear": labels, "labels": labels})
    assert not (tmp_path / f"{finals[1].name}.npz").exists()
    assert sweep.results.read(finals[1]) is None


def test_no_search_has_a_seed_of_the_final_trainings(tmp_path):
    config = faked.load("fashion_mnist")
    for seed, wrong in ((97, False), (98, True)):  # with two fresh seeds after it
        config.seed = seed
        sweep = faked.make_sweep(tmp_path / str(seed), config=config, budget="full", seeds=2)
        if wrong:
            with pytest.raises(UserError, match=r"lower config.seed = 98"):
                check_cells(sweep)
        else:
            faked.finish_all(sweep)
            cells = make_plan(sweep).cells
            seeds = [{c.fields["seed"] for c in cells if c.kind == kind} for kind in
                     ("search", "final")]  # fmt: skip
            assert not seeds[0] & seeds[1]


def test_an_objective_with_the_name_of_a_reference_is_an_error(tmp_path, monkeypatch):
    mine = registry.RegisteredObjective(lambda **_: None)
    monkeypatch.setitem(registry.OBJECTIVES, "supervised", mine)
    with pytest.raises(UserError, match="'supervised' is the name of a reference"):
        check_cells(faked.make_sweep(tmp_path, methods=("supervised",)))


def test_a_damaged_result_is_an_error_that_names_it(tmp_path):
    sweep = faked.make_sweep(tmp_path)
    cell = missing_cells(sweep)[0]
    faked.finish(sweep, cell)
    path = tmp_path / f"{cell.name}.json"
    path.write_text(path.read_text()[:30])
    with pytest.raises(UserError, match=r"music/00.json cannot be read"):
        missing_cells(faked.make_sweep(tmp_path))


def test_wrong_settings_are_named(tmp_path):
    config = faked.load("fashion_mnist")
    config.knn.k = 0
    with pytest.raises(UserError, match=r"search/music: .*knn.k must be at least 1"):
        check_cells(faked.make_sweep(tmp_path, config=config))
    with pytest.raises(UserError, match="do not know how to divide the dataset 'svhn'"):
        images_of("svhn", BUDGETS["full"])


def test_images_to_choose_with_are_not_trained_on():
    for budget in BUDGETS.values():
        images = images_of("fashion_mnist", budget)
        assert images.validation == "train[50000:60000]"
        assert images.train == f"train[:{images.num_train}]"
        assert images.num_train <= 50_000
        assert images.first(10) == "train[:10]"
        assert images.first(10**9) == images.train


@pytest.mark.parametrize(
    ("dataset", "count"),  # of the images in the training split
    [
        *(("mnist5k", 4000), ("digits", 1437), ("shapes", 16_000), ("cifar10", 50_000)),
        *(("cifar100", 50_000), ("imagenette", 9469), ("imagenet2012", 1_281_167)),
    ],
)
def test_training_and_validation_images_are_the_training_split(dataset, count):
    images = images_of(dataset, BUDGETS["full"])
    assert images.train == f"train[:{images.num_train}]"
    assert images.validation == f"train[{images.num_train}:{count}]"


def test_a_small_comparison_tests_claims_that_exist():
    assert set(BUDGETS["small"].claims) < set(BUDGETS["full"].claims) == set(CLAIMS)


def test_a_worker_runs_a_group_that_no_other_worker_runs():
    cells = [Cell(f"search/{name}/{i:02d}", i, "search", {}) for name in "ab" for i in range(2)]
    assert choose(cells, []) == cells[0]
    assert choose(cells[1:], [cells[0]]) == cells[2]
    assert choose(cells[1:2], [cells[0]]) == cells[1]


def test_the_config_of_a_registered_objective_has_its_options(tmp_path):
    sweep = faked.make_sweep(tmp_path)
    options = {"objective.name": "vicreg", "objective.options": {"weight": 0.5}}
    config = sweep.cell_config(Cell("a/00", 0, "search", options))
    assert config_lib.from_json(as_json(config)).objective.options.weight == 0.5
