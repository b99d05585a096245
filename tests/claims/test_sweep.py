"""The cells of a sweep, their order, and the tables of their results."""

import json
import re
import runpy

import numpy as np
import pytest
import scipy.stats
from etils import epath

from music_jax.claims import report
from music_jax.claims import sweep as sweep_lib
from music_jax.claims.grid import SETTINGS, base
from music_jax.claims.run_cells import choose
from music_jax.claims.sweep import Cell
from music_jax.config import default_config
from music_jax.errors import UserError
from music_jax.workdir.run_config import as_json, write_config


def load(name):
    return runpy.run_path(f"configs/{name}.py")["get_config"]()


def make_sweep(tmp_path, name="mnist5k", *, only=(), seeds=3, config=None, **options):
    options |= {"only": only, "seeds": seeds, "directory": str(tmp_path)}
    return sweep_lib.make_sweep(config or load(name), **options)


def test_a_worker_runs_a_setting_that_no_other_worker_runs(tmp_path):
    free = make_sweep(tmp_path, only=("1",)).missing()
    other = next(cell for cell in free if cell.setting != free[0].setting)
    assert choose(free, []) == free[0]
    assert choose(free, [free[0]]) == other
    assert choose(free, [other]) == free[0]
    assert free[1].setting == free[0].setting
    assert choose([free[1]], [free[0]]) == free[1]


def finish(sweep, cell, **result):
    """Writes the files of a finished cell."""
    directory = sweep.directory / cell.name
    directory.mkdir(parents=True)
    write_config(directory, sweep.cell_config(cell))
    (directory / "result.json").write_text(json.dumps({"core_seconds": 36.0} | result))


def accuracy_of(cell):
    """Returns an accuracy that is best at 3e-3, or 1e-2 for music, whatever the depth."""
    best = 1e-2 if cell.setting.method == "music" else 3e-3
    noise = np.random.default_rng(cell.seed).normal(scale=0.001)
    return 0.97 - 0.01 * abs(np.log10(cell.learning_rate / best)) + noise


def finish_all(sweep, **measured):
    while missing := sweep.missing():
        for cell in missing:
            top1 = accuracy_of(cell)
            measures = {"linear_top1": top1, "knn_top1": top1 - 0.01, "ten_shot_top1": top1 - 0.05}
            finish(sweep, cell, **measures | measured)


@pytest.mark.parametrize(
    "name", ["mnist5k", "digits", "shapes", "cifar10", "imagenette", "imagenet"]
)
def test_every_cell_of_every_dataset_has_a_valid_config(tmp_path, name):
    sweep = make_sweep(tmp_path, name, seeds=1)
    settings = sweep.settings_in_order()
    names = [setting.name for setting in settings]
    assert len(names) == len(set(names)) > 30
    sweep.validate()
    configs = [
        json.dumps(as_json(sweep.cell_config(Cell(setting, 0.01, 0, False))))
        for setting in sweep.settings_in_order()
        if not setting.collapsed_start
    ]
    assert len(set(configs)) == len(configs)  # no setting is trained twice under two names


def test_all_methods_have_the_same_backbone_augmentations_and_epochs(tmp_path):
    sweep = make_sweep(tmp_path, only=("1",))
    configs = []
    for method in ("music", "barlow_twins", "vicreg", "simclr"):
        config = as_json(sweep.cell_config(Cell(base(method), 0.01, 0, False)))
        assert config["objective"].pop("name") == method
        configs.append(config)
    assert all(config == configs[0] for config in configs)


def test_learning_rates_are_searched_on_a_part_of_the_training_split_before_anything_else(tmp_path):
    sweep = make_sweep(tmp_path, only=("2",))
    first = sweep.missing()
    assert len(first) == 3 * len(SETTINGS["mnist5k"].learning_rates)
    for cell in first:
        assert cell.searching
        config = sweep.cell_config(cell)
        assert config.dataset.train_split == "train[:80%]"
        assert config.dataset.test_split == "train[80%:]"
    for cell in first:
        finish(sweep, cell, linear_top1=accuracy_of(cell))
    assert sweep.best_rate(base("music")) == 1e-2
    assert sweep.best_rate(base("vicreg")) == 3e-3
    later = sweep.missing()
    deep = [c for c in later if c.setting.name == "vicreg,hidden_layers=2"]
    assert [c.learning_rate for c in deep] == [1e-3, 3e-3, 9e-3]  # about the method's own
    final = [c for c in later if c.setting == base("music")]
    assert [(c.seed, c.learning_rate, c.searching) for c in final] == [
        (seed, 1e-2, False) for seed in range(3)
    ]
    assert sweep.cell_config(final[0]).dataset.test_split == "test"


def test_a_rate_that_diverges_is_not_chosen(tmp_path):
    sweep = make_sweep(tmp_path, only=("1",))
    for cell in sweep.missing():
        if cell.setting == base("music") and cell.learning_rate >= 1e-2:
            finish(sweep, cell, diverged="at step 3 of 9")
        else:
            finish(sweep, cell, linear_top1=accuracy_of(cell))
    assert sweep.best_rate(base("music")) == 3e-3


def test_all_cells_are_counted_and_only_missing_ones_are_run(tmp_path):
    sweep = make_sweep(tmp_path, only=("1", "2"))
    finish_all(sweep)
    done = list(epath.Path(tmp_path).glob("*/*/result.json"))
    assert len(done) == sweep.num_cells()
    removed = epath.Path(tmp_path) / "vicreg,hidden_layers=2" / "seed=1" / "result.json"
    removed.write_text("{")  # cut off
    (epath.Path(tmp_path) / "music" / "seed=2" / "result.json").unlink()
    again = make_sweep(tmp_path, only=("1", "2"))
    assert {cell.name for cell in again.missing()} == {
        "vicreg,hidden_layers=2/seed=1",
        "music/seed=2",
    }
    more = make_sweep(tmp_path, only=("1", "2"), seeds=4)
    assert len(more.missing()) == 2 + len(more.settings_in_order())


def test_results_of_another_config_are_refused(tmp_path):
    finish_all(make_sweep(tmp_path, only=("1",)))
    config = load("mnist5k")
    config.augmentation.view_1.noise_std = 0.3
    with pytest.raises(UserError, match=r"noise_std.*another --output"):
        make_sweep(tmp_path, only=("1",), config=config).missing()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("linear_eval.num_epochs", 7),
        ("knn.k", 3),
        ("compute_dtype", "bfloat16"),
        ("dataset.test_split", "test[:50%]"),
        ("evaluation.test", "mnist:test"),
    ],
)
def test_results_of_another_protocol_are_refused(tmp_path, field, value):
    config = load("mnist5k")
    cell = Cell(base("music"), 1e-2, config.seed, False)
    finish(make_sweep(tmp_path, overridden=(field,)), cell, linear_top1=0.9)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=rf"{field.partition('.')[0]}.*another --output"):
        make_sweep(tmp_path, config=config, overridden=(field,)).result(cell)


def test_a_damaged_result_is_trained_again(tmp_path):
    sweep = make_sweep(tmp_path)
    cell = sweep.missing()[0]
    finish(sweep, cell, linear_top1=0.9)
    (sweep.directory / cell.name / "result.json").write_text("[" * 100_000)
    assert sweep.result(cell) is None


def test_a_search_is_evaluated_on_its_own_part_of_the_training_split(tmp_path):
    config = load("cifar10")
    config.evaluation.train, config.evaluation.test = "cifar100:train", "cifar100:test"
    sweep = make_sweep(tmp_path, config=config)
    searching, final = (
        sweep.cell_config(Cell(base("music"), 0.1, 0, searching)) for searching in (True, False)
    )
    assert (searching.evaluation.train, searching.evaluation.test) == ("", "")
    assert final.evaluation.test == "cifar100:test"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objective.temperature", -1.0, r"music: config\.objective\.temperature must be positive"),
        ("accumulation_steps", 32, r"batch=16: config\.accumulation_steps must divide"),
        ("dataset.path", "images", r"leave config\.dataset\.path unset"),
    ],
)
def test_a_wrong_config_of_any_setting_is_an_error_before_training(tmp_path, field, value, message):
    config = load("mnist5k")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        make_sweep(tmp_path, config=config).validate()


def test_a_result_of_an_earlier_version_still_counts(tmp_path):
    sweep = make_sweep(tmp_path, only=("1",))
    cell = sweep.missing()[0]
    finish(sweep, cell, linear_top1=0.9)
    path = sweep.directory / cell.name / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["objective"]["contrast_temperature"]
    record["config"]["linear_eval"]["raw_pixels"] = True  # as earlier versions left it
    record["config"]["few_shot"]["shots"] = [1, 5, 10]
    record["config"]["knn"]["enabled"] = True
    path.write_text(json.dumps(record))
    assert cell not in make_sweep(tmp_path, only=("1",)).missing()


def test_overrides_on_the_command_line_precede_the_sweeps_own(tmp_path):
    config = load("mnist5k")
    config.num_epochs = 17
    sweep = make_sweep(tmp_path, config=config, overridden=("num_epochs",))
    cell = sweep.cell_config(Cell(base("music"), 0.01, 0, False))
    assert cell.num_epochs == 17
    assert cell.backbone.name == SETTINGS["mnist5k"].overrides["backbone.name"]


def test_unknown_claims_and_datasets_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"no claim '7'.*1, 2, 3, 4, 5, 6"):
        make_sweep(tmp_path, only=("1", "7"))
    config = default_config()
    config.dataset.name = "svhn"
    with pytest.raises(UserError, match=r"'svhn'.*mnist5k.*grid\.py"):
        make_sweep(tmp_path, config=config)


def test_tables_have_means_and_student_intervals(tmp_path):
    sweep = make_sweep(tmp_path, only=("2",))
    finish_all(sweep)
    tables = sweep.tables()
    row = next(r for r in tables[0]["rows"] if (r["series"], r["x"]) == ("music", 2))
    values = [accuracy_of(Cell(base("music"), 1e-2, seed, False)) for seed in range(3)]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    measure = row["measures"]["linear_top1"]
    np.testing.assert_allclose(
        [measure["mean"], measure["half_width"]], [np.mean(values), (high - low) / 2]
    )
    assert (row["learning_rate"], row["rate_at_edge"], row["seeds"]) == (1e-2, False, 3)
    assert row["search"] == {
        name: accuracy_of(Cell(base("music"), float(name), sweep.config.seed, True))
        for name in ("0.0033", "0.01", "0.03")  # a third of the method's own, and three times it
    }

    report.write_tables(tables, sweep.directory)
    assert json.loads((sweep.directory / "claims.json").read_text()) == {"claims": tables}
    lines = (sweep.directory / "claims.csv").read_text().splitlines()
    assert len(lines) == 1 + 12 * 3  # settings, measures
    shown = f"{100 * np.mean(values):.1f} ± {100 * (high - low) / 2:.1f}"
    text = (sweep.directory / "claims.md").read_text()
    assert f"| music | 2 | {shown} |" in text
    numbers = " ---: |" * 5  # three measures, the rate and the seeds
    assert f"| --- | --- |{numbers}" in text


def test_a_rate_that_was_not_searched_is_at_no_edge(tmp_path):
    sweep = make_sweep(tmp_path, only=("1",), seeds=1)
    finish_all(sweep)
    rows = sweep.tables()[0]["rows"]
    configured = [row for row in rows if not row["search"]]
    assert len(configured) == 1
    assert configured[0]["learning_rate"] == sweep.config.optimizer.base_learning_rate
    assert not configured[0]["rate_at_edge"]


def test_differences_match_welchs_t_test(tmp_path):
    a, b = [0.95, 0.96, 0.99], [0.9, 0.93, 0.91, 0.92]
    mean, half = report.difference(a, b)
    interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    np.testing.assert_allclose([mean - half, mean + half], interval)
    assert report.difference([0.9], b) is None


def test_the_report_names_what_is_missing_and_keeps_other_sections(tmp_path):
    path = epath.Path(tmp_path) / "RESULTS.md"
    sweep = make_sweep(tmp_path / "a" / "mnist5k", only=("1", "4"))
    finish_all(sweep)
    tables = sweep.tables()
    report.write_tables(tables, sweep.directory)
    report.write_plots(tables, sweep.directory)
    report.write_section(path, sweep, tables)
    whole = path.read_text()
    for link in re.findall(r"!\[.*\]\((.*)\)", whole):
        assert (tmp_path / link).read_bytes() == (
            tmp_path / "a" / "mnist5k" / link[-11:]
        ).read_bytes()
    assert len(re.findall("claim-[14].png", whole)) == 2
    assert (tmp_path / "results/mnist5k/claims.csv").read_text().startswith("claim,series")
    assert "not complete" not in whole
    assert f"in {sweep.num_cells() / 100:.1f} hours" in whole
    assert "MUSIC minus vicreg: linear +0.0" in whole

    other = make_sweep(tmp_path / "b" / "shapes", "shapes", only=("1", "7"))
    report.write_section(path, other, other.tables())
    assert whole.rstrip() in path.read_text()
    assert "**The tables are not complete**" in path.read_text()

    (sweep.directory / "music" / "seed=2" / "result.json").unlink()
    partial = make_sweep(tmp_path / "a" / "mnist5k", only=("1", "4"))
    report.write_section(path, partial, partial.tables())
    text = path.read_text()
    assert text.count("## mnist5k") == text.count("## shapes") == 1
    mine = text[text.index("## mnist5k") : text.index("<!-- end of claims: mnist5k")]
    assert "**The tables are not complete**" in mine
    assert "2/3" in mine


def write_tables(path, directory, **options):
    """Writes the files that the command writes once all cells are trained."""
    sweep = make_sweep(directory, **options)
    finish_all(sweep)
    shown = sweep.with_earlier()
    tables = shown.tables()
    report.write_tables(tables, shown.directory)
    report.write_section(path, shown, tables)
    return tables


def test_rerunning_one_claim_keeps_the_tables_and_seeds_of_the_others(tmp_path):
    path = epath.Path(tmp_path) / "RESULTS.md"
    whole = write_tables(path, tmp_path / "mnist5k", only=("1", "2", "4"))
    text = path.read_text()
    assert write_tables(path, tmp_path / "mnist5k", only=("1",), seeds=1) == whole
    assert path.read_text() == text
    assert "`python -m music_jax.claims --seeds=3 --only=1,2,4`: " in text
    for directory in (tmp_path / "mnist5k", tmp_path / "results/mnist5k"):
        tables = json.loads((directory / "claims.json").read_text())["claims"]
        assert [table["claim"] for table in tables] == [1, 2, 4]
    added = write_tables(path, tmp_path / "mnist5k", only=("6", "6"))
    assert [table["claim"] for table in added] == [1, 2, 4, 6]


def test_more_seeds_of_one_claim_leave_the_others_complete(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "RESULTS.md"
    monkeypatch.setattr("sys.argv", ["claims", "--config", "configs/mnist5k.py", "--seeds=9"])
    write_tables(path, tmp_path / "mnist5k", only=("6", "4"))
    tables = write_tables(path, tmp_path / "mnist5k", only=("6",), seeds=4)
    wanted = {table["claim"]: {row["seeds_wanted"] for row in table["rows"]} for table in tables}
    assert wanted == {4: {3}, 6: {4}}
    text = path.read_text()
    assert "not complete" not in text
    assert "Not complete" not in text
    command = "`python -m music_jax.claims --config configs/mnist5k.py"
    assert f"{command} --seeds=4 --only=6` and {command} --seeds=3 --only=4`: " in text


def test_sweeps_of_two_configs_of_one_dataset_have_a_section_each(tmp_path):
    path = epath.Path(tmp_path) / "RESULTS.md"
    write_tables(path, tmp_path / "mnist5k", only=("1",))
    text = path.read_text()
    config = load("mnist5k")
    config.augmentation.view_1.noise_std = 0.3
    write_tables(path, tmp_path / "noisy", only=("1",), config=config)
    assert path.read_text().startswith(text.rstrip())
    assert "<!-- claims: noisy -->" in path.read_text()
    assert (tmp_path / "results" / "noisy" / "claims.csv").exists()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_search_validates_on_images_that_it_does_not_train_on(name):
    """In thousandths of the training split, of which the final cells train on all or a part."""

    def part(split):
        low, high = re.fullmatch(r"train(?:\[(\d*)%?:(\d*)%?\])?", split).groups()
        return set(range(10 * int(low or 0), 10 * int(high or 100)))

    settings = SETTINGS[name]
    rest, held_out = map(part, settings.search_splits)
    assert not rest & held_out
    assert rest | held_out == part(settings.overrides.get("dataset.train_split", "train"))


def test_the_mean_over_all_factors_is_shown_where_there_are_factors(tmp_path):
    sweep = make_sweep(tmp_path, "shapes", only=("1",), seeds=2)
    finish_all(sweep, factor_linear_top1=[0.2, 0.6])
    table = sweep.tables()[0]
    assert table["rows"][0]["measures"]["all_factors_top1"]["mean"] == pytest.approx(0.4)
    assert "| all factors |" in report.markdown(table)
    assert "| 40.0 ± 0.0 |" in report.markdown(table)


@pytest.mark.parametrize("name", SETTINGS)
def test_batch_sizes_are_compared_with_that_of_the_config(tmp_path, name):
    (claim,) = make_sweep(tmp_path, name, only=("4",)).tested()
    sizes = [point.x for point in claim.points if point.series == "music"]
    assert load(name).batch_size in sizes
    assert sizes == sorted({*sizes})
    assert len(sizes) >= 3


def test_every_claim_has_a_plot(tmp_path):
    sweep = make_sweep(tmp_path, "shapes", only=("1", "2", "7"), seeds=1)
    finish_all(sweep)
    tables = sweep.tables()
    for row in tables[2]["rows"]:
        row |= {"factors": ["shape", "hue"], "factor_nmi": [np.eye(2).tolist()]}
    report.write_plots(tables, sweep.directory)
    for number in (1, 2, 7):
        png = (sweep.directory / f"claim-{number}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 5000
