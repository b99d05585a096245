"""How much a comparison trains: the search, the seeds, and the parts of each dataset."""

import dataclasses
import math

from music_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Budget:
    """Sizes of a comparison, the same for every method.

    Attributes:
      draws: Random choices of options in a search.
      search_share: Share of the config's epochs that these train.
      kept: Number of best choices that are trained again.
      kept_seeds: Number of fresh seeds of each of these.
      kept_share: Share of the config's epochs that these train.
      final_share: Share of the config's epochs that final cells train.
      extensions: Number of times that ranges are extended at their ends.
      seeds: Default number of final seeds.
      study_seeds: Largest number of seeds of claims 2 and 3, and of the supervised reference.
      few_seeds: Largest number of seeds of claims 4 and 5.
      rates: Number of learning rates searched where another option is fixed, a factor of 2 apart.
      batch_sizes: Sizes beside the config's, as powers of 4 relative to it.
      step_share: Share of the config's epochs whose steps all batch sizes take in claim 4.
      image_share: Share of the training images.
      claims: Claims that are tested by default.
      bootstraps: Number of bootstrap samples.
    """

    draws: int = 24
    search_share: float = 0.25
    kept: int = 4
    kept_seeds: int = 2
    kept_share: float = 0.25
    final_share: float = 1.0
    extensions: int = 3
    seeds: int = 10
    study_seeds: int = 5
    few_seeds: int = 3
    rates: int = 3
    batch_sizes: tuple[int, ...] = (-2, 1, 2)
    step_share: float = 0.1
    image_share: float = 1.0
    claims: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    bootstraps: int = 2000


BUDGETS = {
    "full": Budget(),
    "small": Budget(
        draws=4,
        search_share=0.1,
        kept=2,
        kept_seeds=1,
        kept_share=0.1,
        final_share=0.25,
        extensions=0,
        seeds=3,
        study_seeds=2,
        few_seeds=2,
        batch_sizes=(-2, 1),
        image_share=0.2,
        claims=(1, 6),
        bootstraps=500,
    ),
}
# Numbers of images to train on, and to choose options with, in the training split of each dataset.
_IMAGES = {
    "fashion_mnist": (50_000, 10_000),
    "mnist5k": (3_200, 800),
    "digits": (1_150, 287),
    "shapes": (12_800, 3_200),
    "cifar10": (45_000, 5_000),
    "cifar100": (45_000, 5_000),
    "imagenette": (8_500, 969),
    "imagenet2012": (1_231_167, 50_000),
}


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a comparison: parts of a TFDS dataset's training split, and its test split.

    Attributes:
      num_train: Number of images to train on.
      train: Their split.
      validation: Split of the images on which options are chosen.
    """

    num_train: int
    train: str
    validation: str

    def first(self, count: int) -> str:
        """Returns the split of the first training images."""
        return self.train if count >= self.num_train else f"train[:{count}]"


def images_of(dataset: str, budget: Budget) -> Images:
    """Returns the images of a comparison on a TFDS dataset.

    Raises:
      UserError: It is not known how to divide the dataset.
    """
    name = dataset.partition("/")[0].partition(":")[0]
    if name not in _IMAGES:
        raise UserError(
            f"the claims do not know how to divide the dataset {dataset!r}; they know "
            f"{', '.join(_IMAGES)}; add yours in music_jax/claims/budget.py"
        )
    most, held_out = _IMAGES[name]
    count = math.ceil(most * budget.image_share)
    return Images(count, f"train[:{count}]", f"train[{most}:{most + held_out}]")
