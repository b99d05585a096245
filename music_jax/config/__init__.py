"""The fields that every config has, and the checks that a config must pass before anything runs."""

import dataclasses
import math
import os
import reprlib
import runpy
from typing import Any

from ml_collections import config_dict

from music_jax.config import checks as checks
from music_jax.config.evaluation import add_evaluation
from music_jax.config.values import check_values, set_fields
from music_jax.data.augment import ViewAugmentation
from music_jax.errors import UserError
from music_jax.workdir.paths import normalized

# What may change between two runs of one workdir without changing what is trained.
FREE_FIELDS = (
    "backbone.remat",
    "checkpoint",
    "clustering",
    "compute_dtype",  # the parameters stay; the run says from which step on it is another
    "dataset.data_dir",
    "dataset.manual_dir",
    "dataset.max_skipped_share",
    "dataset.test_split",
    "dataset.try_gcs",
    "deterministic",
    "evaluation",
    "few_shot",
    "finetune",
    "guards",
    "knn",
    "linear_eval",
    "log_every_steps",
    "num_decode_threads",
    "online_probe",
    "retrieval",
    "semi_supervised",
    "sharding",
    "tensorboard",
    "wandb_project",
)


def default_config() -> config_dict.ConfigDict:
    """All fields with their defaults, locked; a config file changes those that differ.

    The defaults are the method's ImageNet recipe where it has one, except for the dataset, which
    has none.
    """
    config = config_dict.ConfigDict()
    config.seed = 0
    config.batch_size = 256  # global, over all devices and processes
    config.accumulation_steps = 1  # embed the batch in so many parts, to save memory
    config.num_epochs = 100
    config.compute_dtype = "float32"  # or bfloat16; parameters and statistics stay float32
    # On GPUs: the same bits each time, for 1.5 x the time of a step of ResNet-50 on an H200.
    config.deterministic = True
    config.log_every_steps = 50
    config.num_decode_threads = config_dict.placeholder(int)  # None: one a usable core
    config.tensorboard = True  # write event files, if tensorboardX is installed
    # Logs to Weights & Biases too, in this project; its own WANDB_ variables say the rest.
    config.wandb_project = ""

    config.objective = config_dict.ConfigDict()
    config.objective.name = "music"  # music, barlow_twins, vicreg, simclr
    config.objective.num_segments = 102  # S, of an embedding of S times K units
    config.objective.units_per_segment = 80  # K
    config.objective.temperature = 1.0  # of the softmax over the units of a segment
    config.objective.diagonal_weight = 1.0
    config.objective.cross_segment_weight = 1.0
    config.objective.invariance_weight = 1.0
    config.objective.off_diagonal_weight = 0.0051  # Barlow Twins
    config.objective.similarity_weight = 25.0  # VICReg, and the two below
    config.objective.variance_weight = 25.0
    config.objective.covariance_weight = 1.0
    config.objective.contrast_temperature = 0.1  # SimCLR

    config.dataset = config_dict.ConfigDict()
    config.dataset.name = ""  # any TFDS name
    # In place of a TFDS name: a folder of images, or what music_jax.pack made of one.
    config.dataset.path = ""
    config.dataset.train_split = "train"
    config.dataset.test_split = "test"
    config.dataset.data_dir = config_dict.placeholder(str)  # None: TFDS's own default
    config.dataset.manual_dir = config_dict.placeholder(str)  # None: downloads/manual in data_dir
    config.dataset.try_gcs = False  # look in TFDS's public bucket first; needs gcsfs
    config.dataset.max_skipped_share = 0.01  # of the images, that may be unreadable
    config.dataset.image_key = "image"
    config.dataset.label_key = "label"
    config.dataset.num_channels = 3
    config.dataset.mean = (0.485, 0.456, 0.406)  # of pixel values in [0, 1]
    config.dataset.std = (0.229, 0.224, 0.225)

    config.crop = config_dict.ConfigDict()
    config.crop.size = 224  # side of the square that the network sees, in pixels
    config.crop.scale = (0.08, 1.0)  # of the image's area
    config.crop.aspect_ratio = (3 / 4, 4 / 3)  # width over height
    config.crop.eval_resize = 256  # the shorter side, before the center is cut

    config.augmentation = config_dict.ConfigDict()
    for view in ("view_1", "view_2"):
        config.augmentation[view] = config_dict.ConfigDict(dataclasses.asdict(ViewAugmentation()))

    config.backbone = config_dict.ConfigDict()
    config.backbone.name = "resnet50"
    config.backbone.remat = False  # compute each block's activations twice, to save memory
    # Of ResNets alone; None is their own default, imagenet and True.
    config.backbone.stem = config_dict.placeholder(str)  # imagenet, cifar, strided
    config.backbone.zero_init_residual = config_dict.placeholder(bool)  # start as the shortcuts
    # Of vision transformers alone; None: 6 for vit_s16, 12 for vit_b16. MoCo v3's have 12.
    config.backbone.num_heads = config_dict.placeholder(int)

    config.projector = config_dict.ConfigDict()
    config.projector.hidden_sizes = (8192,)  # () for a linear projector
    config.projector.output_size = config_dict.placeholder(int)  # None: segments times units

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.name = "lars"  # lars, sgd, adamw
    config.optimizer.base_learning_rate = 0.6  # times batch_size / 256
    config.optimizer.weight_decay = 1e-6
    config.optimizer.momentum = 0.9  # lars and sgd
    config.optimizer.warmup_epochs = 10
    config.optimizer.final_scale = 1e-3  # the last learning rate, as a share of the peak

    config.sharding = config_dict.ConfigDict()
    # Devices over which the parameters themselves are split; None: all. Of several slices of a TPU,
    # best those of one.
    config.sharding.fsdp = config_dict.placeholder(int)

    # What ends a training early; see music_jax.train.guards.
    config.guards = config_dict.ConfigDict()
    config.guards.enabled = True  # False: only the loss and the gradient must be finite
    config.guards.policy = "stop"  # or rewind: to before the bad steps, and go on without them
    config.guards.max_rewinds = 3  # of a whole training; then it stops
    config.guards.warmup_steps = 100  # before which only what is not finite trips
    config.guards.loss_spike_deviations = 10.0  # of the running mean; 0: a leap trips nothing
    config.guards.loss_spike_window = 25  # steps that the running mean looks back
    config.guards.collapse_steps = 50  # in a row that look collapsed, for any of the four below
    config.guards.min_usage_entropy = 0.1  # of segments, 1 being uniform; 0: trips nothing
    config.guards.max_dead_units = 0.95  # a share; 1: trips nothing
    config.guards.min_embedding_std = 0.01  # of unit vectors, 1 being all around; 0: trips nothing
    config.guards.min_effective_rank = 1.1  # of the embeddings; 0: trips nothing
    config.guards.check_replicas_every_steps = 0  # all devices hold the same bits; 0: never
    config.guards.check_determinism_every_steps = 0  # a step done twice gives the same; 0: never

    config.checkpoint = config_dict.ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.max_to_keep = 2  # the newest
    config.checkpoint.ignore_failed_saves = False  # of one process: say so and go on
    config.checkpoint.grace_seconds = 240.0  # within which a run that is stopped saves and ends

    add_evaluation(config)
    return config.lock()


def set_views(config: config_dict.ConfigDict, **augmentation: Any) -> None:
    """Sets the same augmentation for both views."""
    for view in ("view_1", "view_2"):
        config.augmentation[view].update(augmentation)


def view_augmentations(config: config_dict.ConfigDict) -> tuple[ViewAugmentation, ...]:
    """The augmentation of each view.

    Raises:
      UserError: a field is out of its range.
    """
    try:
        return tuple(
            ViewAugmentation(**config.augmentation[view].to_dict()) for view in ("view_1", "view_2")
        )
    except ValueError as error:
        raise UserError(f"config.augmentation: {error}") from error


def choices() -> dict[str, tuple[Any, ...]]:
    """The fields that take one of a few values, by dotted name, with these values."""
    from music_jax.evaluation.metrics.feature_scaling import FEATURE_SCALINGS
    from music_jax.models import BACKBONES
    from music_jax.models.resnet import STEMS
    from music_jax.train.recipe import OBJECTIVES, OPTIMIZERS

    return {
        "objective.name": tuple(OBJECTIVES),
        "backbone.name": tuple(BACKBONES),
        "backbone.stem": tuple(STEMS),
        "optimizer.name": tuple(OPTIMIZERS),
        "compute_dtype": ("float32", "bfloat16"),
        "dataset.num_channels": (1, 3),
        "guards.policy": ("stop", "rewind"),
        "linear_eval.feature_scaling": FEATURE_SCALINGS,
    }


def validate(config: config_dict.ConfigDict) -> None:
    """Checks all that can be checked without devices or data.

    Raises:
      UserError: a field has a value that cannot be meant; the message names the field.
    """
    from music_jax.models.network import embedding_size

    check_values(config, default_config())
    for field, known in choices().items():
        if checks.get(config, field) is not None:  # `backbone.stem` may be left unset
            checks.check_one_of(config, field, known)
    checks.check_backbone(config)
    for field in (
        "accumulation_steps",
        "num_epochs",
        "log_every_steps",
        "crop.size",
        "checkpoint.every_steps",
        "checkpoint.max_to_keep",
        "linear_eval.num_epochs",
        "linear_eval.batch_size",
        "knn.k",
        "evaluation.batch_size",
        "evaluation.view_images",
        "few_shot.draws",
        "semi_supervised.num_epochs",
        "finetune.num_epochs",
        "retrieval.max_gallery",
        "clustering.num_starts",
        "online_probe.every_steps",
    ):
        checks.check_at_least(config, field, 1)
    threads = config.num_decode_threads
    if threads is not None and not 1 <= threads <= 1024:
        raise checks.wrong(config, "num_decode_threads", "be in [1, 1024] or unset, for one a core")
    checks.check_batches(config)
    checks.check_guards(config)
    for field in ("objective.num_segments", "objective.units_per_segment"):
        checks.check_at_least(config, field, 2)
    for field in (
        "objective.temperature",
        "objective.contrast_temperature",
        "optimizer.base_learning_rate",
        "checkpoint.grace_seconds",
        "knn.temperature",
        "few_shot.inverse_regularization",
        "finetune.backbone_learning_rate",
        "finetune.head_learning_rate",
        "online_probe.learning_rate",
    ):
        checks.check_positive(config, field)
    parts = ("optimizer", "linear_eval", "semi_supervised", "finetune", "online_probe")
    for field in [f"{part}.weight_decay" for part in parts]:
        checks.check_at_least(config, field, 0)
    for field in [f"{part}.momentum" for part in parts]:
        if not 0 <= checks.get(config, field) < 1:
            raise checks.wrong(config, field, "be in [0, 1)")
    if config.sharding.fsdp is not None:
        checks.check_at_least(config, "sharding.fsdp", 1)
    if not 0 <= config.seed < 2**32:
        raise checks.wrong(config, "seed", "be in [0, 2**32)")
    if config.crop.eval_resize < config.crop.size:
        raise checks.wrong(
            config, "crop.eval_resize", f"be at least crop.size = {config.crop.size}"
        )
    for field, limit in (("crop.scale", 1.0), ("crop.aspect_ratio", math.inf)):
        value = checks.get(config, field)
        if len(value) != 2 or not 0 < value[0] <= value[1] <= limit:
            raise checks.wrong(config, field, f"be a pair 0 < low <= high <= {limit}")
    if not 0 <= config.dataset.max_skipped_share <= 1:
        raise checks.wrong(config, "dataset.max_skipped_share", "be in [0, 1]")
    for field in ("dataset.mean", "dataset.std"):
        if len(checks.get(config, field)) != config.dataset.num_channels:
            raise checks.wrong(
                config, field, f"have num_channels = {config.dataset.num_channels} numbers"
            )
    if any(s <= 0 for s in config.dataset.std):
        raise checks.wrong(config, "dataset.std", "be positive")
    if any(size < 1 for size in config.projector.hidden_sizes):
        raise checks.wrong(config, "projector.hidden_sizes", "be positive sizes")
    if not 0 <= config.optimizer.warmup_epochs < config.num_epochs:
        raise checks.wrong(
            config, "optimizer.warmup_epochs", f"be in [0, num_epochs = {config.num_epochs})"
        )
    rates = config.linear_eval.base_learning_rates
    if not rates or any(rate <= 0 for rate in rates):
        raise checks.wrong(
            config, "linear_eval.base_learning_rates", "be one or more positive numbers"
        )
    if not 0 < config.linear_eval.validation_fraction < 1:
        raise checks.wrong(config, "linear_eval.validation_fraction", "be in (0, 1)")
    checks.check_evaluation(config)
    checks.check_embedding(config, embedding_size(config))
    view_augmentations(config)


def is_free(field: str) -> bool:
    """Whether a field, by its dotted name, may change without changing what is trained."""
    return any(field == free or field.startswith(free + ".") for free in FREE_FIELDS)


def from_file(path: str | os.PathLike[str], **fields: Any) -> config_dict.ConfigDict:
    """The config of a config file, with other values for some of its fields.

        config = from_file("configs/digits.py", num_epochs=8, objective={"num_segments": 16})

    Args:
      path: a Python file with a function `get_config`, such as those in `configs/`.
      **fields: fields by name; those of a part as a dictionary.

    Returns:
      The config.

    Raises:
      UserError: the file cannot be read or has no such function, there is no such field, or a
        field takes no such value.
    """
    name = os.fspath(path)
    try:
        get_config = runpy.run_path(name)["get_config"]
    except Exception as error:  # whatever a config file raises is its author's mistake
        raise UserError(
            f"{name!r} is no config file, such as configs/digits.py: {_reason(error)}"
        ) from error
    try:
        config = get_config()
    except Exception as error:
        raise UserError(f"the config file {name!r} fails: {_reason(error)}") from error
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"get_config of the config file {name!r} must return a config, as "
            f"music_jax.config.default_config makes one; got {config!r:.100}"
        )
    set_fields(config, fields)
    check_values(config, default_config())
    return config


def _reason(error: Exception) -> str:
    """What an error says, in one line, without all fields that ml_collections adds to it."""
    name = type(error).__name__
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    said, _, rest = text.partition("Other fields present")
    hint = rest.rpartition("Did you mean")
    return " ".join(f"{name}: {said}{hint[1]}{hint[2] if hint[1] else ''}".split())


def from_json(record: dict[str, Any]) -> config_dict.ConfigDict:
    """Returns the config that `config.json` holds, of this version of the package or another one.

    Fields that it lacks get their defaults. Fields that this version lacks are dropped if they do
    not change what is trained.

    Raises:
      UserError: it has another field that this version lacks, or a value of the wrong type.
    """
    config = default_config()
    try:
        config.update(_tuples(_without_unknown_free_fields(record, config.to_dict())))
    except Exception as error:  # whatever a ConfigDict raises on a record of another form
        reason = " ".join(str(error).split("Other fields present")[0].split())
        raise UserError(f"the saved config does not fit this version: {reason[:300]}") from error
    return config


def _without_unknown_free_fields(
    record: dict[str, Any], known: dict[str, Any], prefix: str = ""
) -> dict[str, Any]:
    kept = {}
    for key, value in record.items():
        if key not in known:
            if is_free(prefix + key):
                continue
        elif isinstance(value, dict) and isinstance(known[key], dict):
            value = _without_unknown_free_fields(value, known[key], f"{prefix}{key}.")
        kept[key] = value
    return kept


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names, with both values, of the fields that decide what is trained and differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name = prefix + key
        if is_free(name):
            continue
        a, b = old.get(key), new.get(key)
        if name == "dataset.path" and isinstance(a, str) and isinstance(b, str):
            a, b = normalized(a), normalized(b)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, name + ".")
        elif a != b:
            found.append(f"{name}: {reprlib.repr(a)} there, {reprlib.repr(b)} now")
    return found
