"""Functions and names that higher packages register for lower ones."""

from collections.abc import Callable
from typing import Any

# Called as (config, workdir, source) at the start of a training; returns an object like
# `music_jax.evaluation.final.FinalEvaluation`, which evaluates the backbone at the end.
final_evaluation: Callable[..., Any]
