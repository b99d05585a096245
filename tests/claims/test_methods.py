"""The options of methods, and how they are drawn and become config fields."""

import collections
import itertools

import pytest

import music_jax
from music_jax import registry
from music_jax.claims.methods import BUILT_IN, COMMON, beyond, find_methods
from music_jax.errors import UserError


@pytest.mark.parametrize("name", BUILT_IN)
def test_draws_use_all_values_of_each_option_equally_often(name):
    method = BUILT_IN[name]
    draws = method.draw(24)
    assert draws == method.draw(24)
    assert len({tuple(choice.items()) for choice in draws}) == 24
    for option, values in method.all_options.items():
        counts = collections.Counter(choice[option] for choice in draws)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_few_draws_reach_both_ends_of_each_range(name):
    method = BUILT_IN[name]
    draws = method.draw(4)
    for option, values in method.all_options.items():
        assert {values[0], values[-1]} <= {choice[option] for choice in draws}


def test_the_common_options_are_those_of_the_plan():
    """See docs/comparison.md."""
    rates = COMMON["learning_rate"]
    assert (rates[0], rates[-1]) == (0.001, 0.032)
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([2] * 5)
    assert COMMON["depth"] == (0, 1, 2)
    assert COMMON["dimension"] == (128, 512, 2048)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_values_of_an_option_are_about_a_constant_factor_apart(name):
    for option, values in BUILT_IN[name].options.items():
        factors = [b / a for a, b in itertools.pairwise(values)]
        assert min(factors) > 1.9, option
        assert max(factors) < 1.2 * min(factors), option


def test_methods_draw_differently():
    rates = {tuple(c["learning_rate"] for c in method.draw(24)) for method in BUILT_IN.values()}
    assert len(rates) == len(BUILT_IN)


def test_the_weight_of_barlow_twins_falls_with_the_dimension():
    choice = {"depth": 2, "dimension": 8192, "weight_factor": 1.0}
    fields = BUILT_IN["barlow_twins"].fields(choice)
    assert fields["objective.off_diagonal_weight"] == pytest.approx(0.0051, rel=0.01)  # the paper's
    assert fields["projector.output_size"] == 8192
    assert fields["projector.hidden_sizes"] == (512, 512)


def test_segments_follow_from_the_dimension():
    choice = {"depth": 0, "dimension": 512, "units": 16, "temperature": 0.5}
    fields = BUILT_IN["music_centered"].fields(choice)
    assert fields["objective.num_segments"] == 32
    assert fields["objective.units_per_segment"] == 16
    assert fields["objective.center"] is True
    assert BUILT_IN["music"].fields(choice)["objective.center"] is False


@pytest.mark.parametrize(
    ("option", "values", "value", "expected"),
    [
        ("learning_rate", [1e-3, 2e-3, 4e-3], 4e-3, 8e-3),
        ("learning_rate", [4e-3, 1e-3, 2e-3], 1e-3, 5e-4),
        ("learning_rate", [1e-3, 2e-3, 4e-3], 2e-3, None),
        ("units", [4, 8, 16], 16, 32),
        ("weight", [0.1, 0.3, 3.0], 3.0, 30.0),
        ("weight", [0.0, 1.0], 1.0, None),
        ("dimension", [128, 512], 512, None),
        ("depth", [0, 1, 2], 2, None),
        ("kind", ["a", "b"], "b", None),
        ("flag", [False, True], True, None),
        ("single", [3.0], 3.0, None),
    ],
)
def test_ranges_are_continued_at_their_ends(option, values, value, expected):
    assert beyond(option, values, value) == (None if expected is None else pytest.approx(expected))


@pytest.fixture
def registered():
    def register(**options):
        music_jax.register_objective("mine", lambda **_: None, **options)

    yield register
    del registry.OBJECTIVES["mine"]


def test_a_registered_objective_is_searched_like_the_others(registered):
    registered(search={"weight": [0.1, 1.0], "kind": ["a", "b", "c"]})
    (method,) = find_methods(["mine"])
    assert {"learning_rate", "depth", "dimension", "weight", "kind"} == set(method.all_options)
    fields = method.fields({"depth": 1, "dimension": 128, "weight": 0.1, "kind": "b"})
    assert fields == {
        "objective.name": "mine",
        "objective.options": {"weight": 0.1, "kind": "b"},
        "projector.hidden_sizes": (512,),
        "projector.output_size": 128,
    }


@pytest.mark.parametrize(
    ("search", "message"),
    [({"depth": [1]}, "searches 'depth'"), ({"weight": []}, "no values for its option 'weight'")],
)
def test_wrong_options_of_a_registered_objective(registered, search, message):
    registered(search=search)
    with pytest.raises(UserError, match=message):
        find_methods(["mine"])


def test_unknown_and_repeated_methods_are_errors():
    with pytest.raises(UserError, match=r"'mine' is neither one of music, .* --import=MODULE"):
        find_methods(["music", "mine"])
    with pytest.raises(UserError, match="names 'music' twice"):
        find_methods(["music", "music"])
