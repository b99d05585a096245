"""A comparison of objectives, and the configs that its cells train."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import config_dict

from music_jax import config as config_lib
from music_jax.claims.budget import Budget, Images
from music_jax.claims.cells import Cell, Results
from music_jax.claims.methods import Choice, Method
from music_jax.errors import UserError

MIN_WARMUP_STEPS = 100

# Fields with the same values in all cells.
_PROTOCOL = {
    "dataset.test_split": "",  # the cell measures, not the training
    "guards.enabled": False,  # a collapse is a result
    "few_shot.shots": (10,),
    "few_shot.draws": 20,
    "tensorboard": False,
}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A comparison of methods on a dataset.

    Attributes:
      config: Config of the comparison.
      images: Images to train on and to choose options with.
      budget: Its sizes.
      methods: Methods to compare.
      claims: Numbers of the claims to test.
      seeds: Number of final seeds.
      results: Results of its cells.
    """

    config: config_dict.ConfigDict
    images: Images
    budget: Budget
    methods: Sequence[Method]
    claims: Sequence[int]
    seeds: int
    results: Results

    def cell_config(self, cell: Cell) -> config_dict.ConfigDict:
        """Returns the config that a cell trains."""
        config = config_dict.ConfigDict(self.config.to_dict())
        shared = _PROTOCOL | {"dataset.train_split": self.images.train}
        with config.unlocked():
            config.update_from_flattened_dict(shared)
            for name, value in cell.fields.items():
                group, _, field = name.rpartition(".")
                if field == "options":  # of a registered objective
                    config[group].options = config_dict.ConfigDict(value)
                else:
                    config.update_from_flattened_dict({name: value})
        return config

    def make_cell(
        self,
        name: str,
        index: int,
        method: Method,
        choice: Choice,
        seed: int,
        epochs: int,
        **more: Any,
    ) -> Cell:
        """Makes a cell that trains a choice.

        Args:
          name: Directory of the cell.
          index: Index of the cell in it, which names it.
          method: Method.
          choice: Values of the method's options.
          seed: Seed.
          epochs: Number of epochs.
          **more: `kind`, `start` and further config fields by `fields`.
        """
        fields = method.fields(choice) | more.pop("fields", {})
        fields |= {"seed": seed, "num_epochs": epochs}
        default, size = self.config.batch_size, fields.get("batch_size", self.config.batch_size)
        # Adam's step hardly depends on the scale of a gradient, whose noise falls with the root of
        # the batch size: so the peak grows with it. `base_learning_rate` scales linearly.
        peak = choice["learning_rate"] * (size / default) ** 0.5
        fields["optimizer.base_learning_rate"] = float(f"{peak * 256 / size:.6g}")
        count = more.pop("num_images", self.images.num_train)
        steps = epochs * (count // size)
        warmup = round(self.config.optimizer.warmup_epochs * epochs / self.config.num_epochs)
        fields["optimizer.warmup_epochs"] = min(warmup, epochs - 1)
        fields["optimizer.min_warmup_steps"] = min(MIN_WARMUP_STEPS, steps // 2)
        kind = more.pop("kind", "final")
        return Cell(f"{name}/{index:02d}", index, kind, fields, cost=epochs * count, **more)

    @property
    def final_epochs(self) -> int:
        """Number of epochs of final cells."""
        return self.epochs(self.budget.final_share)

    def epochs(self, share: float) -> int:
        """Returns a share of the config's epochs, at least one."""
        return max(1, round(share * self.config.num_epochs))

    def is_valid(self, cell: Cell) -> bool:
        """Returns whether the cell's config is valid."""
        try:
            config_lib.validate(self.cell_config(cell))
        except UserError:
            return False
        return True
