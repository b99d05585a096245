"""Every field of a config: its default, its description, and whether a resume may change it."""

import inspect
import re
from typing import Any

from ml_collections import config_dict

# Fields and groups that may change when a run resumes, since they do not affect the training.
FREE_FIELDS = (
    *("backbone.remat", "checkpoint", "dataset.data_dir", "dataset.manual_dir"),
    *("dataset.max_skipped_share", "dataset.test_split", "dataset.try_gcs", "deterministic"),
    *("evaluation", "few_shot", "finetune", "guards", "knn", "linear_eval", "log_every_steps"),
    *("num_decode_threads", "online", "online_probe", "semi_supervised", "sharding"),
    *("tensorboard", "wandb_project"),
    "compute_dtype",  # Parameters stay float32, and the run logs from which step it differs.
)
# Groups of earlier versions that did not affect the training either.
_REMOVED_GROUPS = ("clustering", "retrieval")


def default_config() -> config_dict.ConfigDict:
    """Returns a locked config with the default of every field.

    The defaults are the method's ImageNet recipe, except for the dataset, which has to be set.
    """
    # The comments below are what `--helpfields` and the documentation print.
    config = config_dict.ConfigDict()
    config.seed = 0  # Seed of the initial weights, image order, crops and augmentations.
    config.batch_size = 256  # Global batch size, over all devices and processes.
    config.accumulation_steps = 1  # Number of microbatches per batch; more of them save memory.
    config.num_epochs = 100  # Passes over the training images.
    # float32 or bfloat16; parameters and statistics stay float32.
    config.compute_dtype = "float32"
    # Disables nondeterministic GPU operations and XLA's choice of the fastest ones.
    config.deterministic = True
    config.log_every_steps = 50  # Interval of the lines in metrics.jsonl.
    # Threads that decode and crop images. None: one per usable core.
    config.num_decode_threads = config_dict.placeholder(int)
    # Writes TensorBoard event files beside metrics.jsonl, if the extra `tensorboard` is installed.
    config.tensorboard = True
    # Also logs to this project of Weights & Biases; its WANDB_ variables set everything else.
    config.wandb_project = ""

    config.objective = config_dict.ConfigDict()
    # music, barlow_twins, vicreg, simclr, sigreg, tcr, discrete or a registered one.
    config.objective.name = "music"
    config.objective.num_segments = 102  # MUSIC: number of segments of the embedding.
    config.objective.units_per_segment = 80  # MUSIC: number of units of each segment.
    config.objective.temperature = 1.0  # Temperature of the softmax over a segment's units.
    # MUSIC: whether each view's mean is subtracted from its embeddings first. Inference subtracts a
    # running mean.
    config.objective.center = False
    config.objective.diagonal_weight = 1.0  # MUSIC: weight of the diagonal term.
    config.objective.cross_segment_weight = 1.0  # MUSIC: weight of the cross-segment term.
    config.objective.invariance_weight = 1.0  # MUSIC: weight of the invariance term.
    config.objective.off_diagonal_weight = 0.0051  # Barlow Twins: weight of the second sum.
    config.objective.similarity_weight = 25.0  # VICReg: weight of the distance of views.
    config.objective.variance_weight = 25.0  # VICReg: weight of the variance term.
    config.objective.covariance_weight = 1.0  # VICReg: weight of the covariance term.
    config.objective.contrast_temperature = 0.1  # SimCLR: temperature of the softmax.
    config.objective.sigreg_weight = 0.05  # SIGReg: weight of the statistic; invariance: the rest.
    config.objective.num_slices = 1024  # SIGReg: random directions per step.
    config.objective.num_points = 17  # SIGReg: points of the trapezoidal rule.
    config.objective.t_max = 5.0  # SIGReg: limit of the integral.
    config.objective.cosine_weight = 200.0  # TCR: weight of the cosine similarity of views.
    config.objective.epsilon_squared = 0.2  # TCR: squared distortion of the coding rate.
    config.objective.sharpness_weight = 1.0  # Discrete: weight of the mean entropy.
    config.objective.diversity_weight = 1.0  # Discrete: weight of the entropy of the mean.
    config.objective.options = config_dict.ConfigDict()  # Arguments of a registered objective.

    config.dataset = config_dict.ConfigDict()
    # Name of a TFDS dataset or of a registered one; or hf: and a folder or name of Hugging Face.
    config.dataset.name = ""
    # Folder of images, or output of music_jax.pack, to use instead of a TFDS dataset.
    config.dataset.path = ""
    config.dataset.train_split = "train"  # Split of `name` to train on, such as train[:90%].
    config.dataset.test_split = "test"  # Split of `name` to test on.
    config.dataset.options = config_dict.ConfigDict()  # Arguments of a registered dataset.
    # Directory of prepared datasets. None: the default of TFDS or of Hugging Face.
    config.dataset.data_dir = config_dict.placeholder(str)
    # Files that TFDS cannot download itself. None: downloads/manual in data_dir.
    config.dataset.manual_dir = config_dict.placeholder(str)
    config.dataset.try_gcs = False  # Looks in the public bucket of TFDS first; needs gcsfs.
    config.dataset.max_skipped_share = 0.01  # Largest share of unreadable images.
    # Feature of a TFDS dataset that is the image; several, with commas between, are its channels.
    config.dataset.image_key = "image"
    # Feature that is the label; several, with commas between, for images of several classes.
    config.dataset.label_key = "label"
    # Number of channels. Gray and RGB image files are converted to this number if it is 1 or 3.
    config.dataset.num_channels = 3
    config.dataset.pixel_type = "uint8"  # Type of the images' values: uint8, uint16 or float32.
    # Mean of each channel: of uint8 values divided by 255, of other types as they are. (): mean and
    # std are those of the training images, as music_jax.channel_statistics computes them.
    config.dataset.mean = (0.485, 0.456, 0.406)
    config.dataset.std = (0.229, 0.224, 0.225)  # Standard deviation of each channel, likewise.

    config.crop = config_dict.ConfigDict()
    config.crop.size = 224  # Side in pixels of the square that the network gets.
    config.crop.scale = (0.08, 1.0)  # Range of the crop's share of the image's area.
    config.crop.aspect_ratio = (3 / 4, 4 / 3)  # Range of width over height.
    config.crop.eval_resize = 256  # Length of the shorter side before a center crop.

    # Further, smaller crops of each image, as in SwAV and DINO. The loss is the mean over the pairs
    # of one of the two views with every other crop.
    config.local_views = config_dict.ConfigDict()
    config.local_views.count = 0  # Number per image, at most 100.
    config.local_views.size = 96  # Side in pixels of the square that the network gets.
    config.local_views.scale = (0.05, 0.3)  # Range of the crop's share of the image's area.

    # The augmentation of each view, in the order in which it is applied after the crop. Strengths
    # are those of torchvision. Jitter, grayscale and solarize leave images of other numbers of
    # channels than 1 and 3 unchanged.
    config.augmentation = config_dict.ConfigDict()
    config.augmentation.view_1 = view = config_dict.ConfigDict()
    # Probability of an affine warp (bilinear; outside, black for uint8, else each channel's mean).
    view.affine_probability = 0.0
    view.rotation_degrees = 0.0  # Rotation is drawn in [-rotation_degrees, rotation_degrees].
    # Shift along each side is drawn in [-translation, translation], as a fraction of that side.
    view.translation = 0.0
    view.scale = (1.0, 1.0)  # Range of the scale factor.
    view.shear_degrees = 0.0  # Shear along x is drawn in [-shear_degrees, shear_degrees].
    view.flip_probability = 0.0  # Probability of a left-right flip.
    # Probability of a color jitter: brightness, contrast, saturation, hue, in this order.
    view.jitter_probability = 0.0
    view.brightness = 0.0  # Factor is drawn in [max(0, 1 - brightness), 1 + brightness].
    view.contrast = 0.0  # Factor is drawn in [max(0, 1 - contrast), 1 + contrast].
    view.saturation = 0.0  # Factor is drawn likewise; no effect on one channel.
    # Shift is drawn in [-hue, hue], in turns of the color circle; no effect on one channel.
    view.hue = 0.0
    view.grayscale_probability = 0.0  # Probability of a grayscale view.
    # Probability of a Gaussian blur with a kernel of about a tenth of the side.
    view.blur_probability = 0.0
    view.blur_sigma = (0.1, 2.0)  # Range of the blur's standard deviation, in pixels.
    view.solarize_probability = 0.0  # Probability of inverting all values of 0.5 and above.
    view.noise_probability = 0.0  # Probability of Gaussian noise, independent for each value.
    # Standard deviation of the noise: for uint8, of values in [0, 1]; else, relative to that of the
    # channel.
    view.noise_std = 0.0
    config.augmentation.view_2 = config_dict.ConfigDict(view.to_dict())
    config.augmentation.local = config_dict.ConfigDict(view.to_dict())  # Of all local views.

    config.backbone = config_dict.ConfigDict()
    # small_resnet, tiny_resnet, pooled_resnet, resnet18, resnet34, resnet50, vit_s16, vit_b16 or a
    # registered one.
    config.backbone.name = "resnet50"
    config.backbone.remat = False  # Computes each block's activations twice to save memory.
    config.backbone.stem = config_dict.placeholder(str)  # ResNets: imagenet, cifar or strided.
    # ResNets: whether each block is initialized to its shortcut. None: True.
    config.backbone.zero_init_residual = config_dict.placeholder(bool)
    # Vision transformers: attention heads. None: 6 for vit_s16, 12 for vit_b16. MoCo v3: 12.
    config.backbone.num_heads = config_dict.placeholder(int)
    # Weights that a new training starts from: a run, or a safetensors file of music_jax.export,
    # torchvision or timm. "": random weights.
    config.backbone.init_from = ""
    # Number of first stages whose parameters are frozen. ResNets: 1 is the stem, 2 also the first
    # stage, ...; vision transformers: 1 is the patch embedding, 2 also the first block, ...
    config.backbone.frozen_stages = 0
    config.backbone.options = config_dict.ConfigDict()  # Arguments of a registered backbone.

    config.projector = config_dict.ConfigDict()
    config.projector.hidden_sizes = (8192,)  # (): a linear projector.
    # Size of the embedding. None: segments times units.
    config.projector.output_size = config_dict.placeholder(int)

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.name = "lars"  # lars, sgd or adamw.
    config.optimizer.base_learning_rate = 0.6  # Peak for a batch of 256; scales with batch_size.
    # Learning rate of the backbone relative to that of the projector. 0: its parameters are frozen,
    # but its running statistics are updated.
    config.optimizer.backbone_scale = 1.0
    config.optimizer.weight_decay = 1e-6  # Weight decay of parameters of two or more dimensions.
    config.optimizer.momentum = 0.9  # Momentum of lars and sgd.
    config.optimizer.warmup_epochs = 10  # Epochs of the linear warm-up from 0.
    config.optimizer.min_warmup_steps = 0  # Lengthens a warm-up that has fewer steps.
    config.optimizer.final_scale = 1e-3  # Last learning rate as a fraction of the peak.

    config.sharding = config_dict.ConfigDict()
    # Number of devices over which parameters are sharded. None: all devices of a TPU slice, or of a
    # machine with GPUs.
    config.sharding.fsdp = config_dict.placeholder(int)

    # Checks that end a failing training early.
    config.guards = config_dict.ConfigDict()
    config.guards.enabled = True  # False: only the loss and the gradient must be finite.
    # What a tripped guard does: stop, or rewind to the last good checkpoint and skip the bad steps.
    config.guards.policy = "stop"
    config.guards.max_rewinds = 3  # Maximum number of rewinds in a training; then it stops.
    config.guards.warmup_steps = 100  # First steps, in which only non-finite values trip a guard.
    # Deviation from the running mean of the loss that counts as a spike; 0 disables the check.
    config.guards.loss_spike_deviations = 10.0
    config.guards.loss_spike_window = 25  # Steps over which the mean of the loss is taken.
    # Consecutive steps after which one of the four limits below ends the training.
    config.guards.collapse_steps = 50
    # Usage entropy of the segments, 1 for uniform usage; 0 disables the check.
    config.guards.min_usage_entropy = 0.1
    config.guards.max_dead_units = 0.95  # Share of dead units; 1 disables the check.
    # Standard deviation of normalized embeddings, 1 for isotropic ones; 0 disables the check.
    config.guards.min_embedding_std = 0.01
    # Effective rank of the embeddings; 0 disables the check.
    config.guards.min_effective_rank = 1.1
    # Interval of the check that all devices hold the same bits; 0 disables it.
    config.guards.check_replicas_every_steps = 0
    # Interval of the check that a repeated step gives the same bits; 0 disables it.
    config.guards.check_determinism_every_steps = 0

    config.checkpoint = config_dict.ConfigDict()
    config.checkpoint.every_steps = 1000  # Interval of checkpoints.
    config.checkpoint.max_to_keep = 2  # Number of newest checkpoints to keep.
    # Continues after a failed save with a warning, in runs of one process.
    config.checkpoint.ignore_failed_saves = False
    config.checkpoint.grace_seconds = 240.0  # Time that a stopped run has to save and exit.

    # Images to evaluate on, if not those of the dataset: a labeled folder, or NAME:SPLIT of TFDS.
    config.evaluation = config_dict.ConfigDict()
    config.evaluation.train = ""  # "": the images of the pre-training.
    # "": dataset.test_split; with dataset.path, no probe is trained.
    config.evaluation.test = ""
    config.evaluation.batch_size = 256  # Images per forward pass.
    # Number of images whose augmented views are compared, for LiDAR and alignment.
    config.evaluation.view_images = 1024
    config.evaluation.num_views = 10  # Views of each of these images.

    config.linear_eval = config_dict.ConfigDict()
    config.linear_eval.num_epochs = 100  # Epochs of the linear probe.
    config.linear_eval.batch_size = 256  # Its batch size.
    # Candidate learning rates, of which the best is used; they scale with batch_size / 256.
    config.linear_eval.base_learning_rates = (0.02,)
    config.linear_eval.momentum = 0.9  # Its momentum.
    config.linear_eval.weight_decay = 1e-6  # Its weight decay.
    # Epochs after which the learning rate is divided by 10. (): a cosine schedule.
    config.linear_eval.drop_epochs = ()
    # New crops and flips in each epoch; False: one center crop per image.
    config.linear_eval.random_crops = True
    # Scaling of features, fitted on the training split: none, standardize or whiten.
    config.linear_eval.feature_scaling = "none"
    # Share of the training split on which the learning rate is chosen.
    config.linear_eval.validation_fraction = 0.1
    config.linear_eval.raw_pixels = False  # Also probes raw pixels, for comparison.
    config.linear_eval.random_init = False  # Also probes a backbone with random weights.

    config.knn = config_dict.ConfigDict()
    config.knn.enabled = True  # Holds the features of the training split in memory.
    config.knn.k = 20  # Number of neighbors that vote.
    config.knn.more_k = (10, 200)  # Further numbers of neighbors to report.
    config.knn.temperature = 0.07  # A neighbor's vote counts exp(similarity / temperature).

    config.few_shot = config_dict.ConfigDict()
    config.few_shot.shots = (1, 5, 10)  # Labeled samples per class.
    config.few_shot.draws = 20  # Random choices of the labeled samples.

    # Fine-tuning on a fraction of the labels.
    config.semi_supervised = config_dict.ConfigDict()
    config.semi_supervised.fractions = (0.01, 0.1)  # Fractions of the labeled images.
    # Files that list the images of each fraction, one per line, such as those that SimCLR gives
    # for ImageNet. "": a stratified draw.
    config.semi_supervised.lists = ("", "")
    # Learning rate of the backbone for each fraction; scales with batch_size / 256.
    config.semi_supervised.backbone_learning_rates = (0.03, 0.01)
    config.semi_supervised.head_learning_rates = (0.08, 0.1)  # Of the classifier, likewise.
    config.semi_supervised.num_epochs = 20  # Epochs of the fine-tuning.
    config.semi_supervised.batch_size = 256  # Its batch size.
    config.semi_supervised.momentum = 0.9  # Its momentum.
    config.semi_supervised.weight_decay = 0.0  # Its weight decay.

    # Fine-tuning on all labels.
    config.finetune = config_dict.ConfigDict()
    # Learning rate of the backbone; scales with batch_size / 256.
    config.finetune.backbone_learning_rate = 0.01
    config.finetune.head_learning_rate = 0.1  # Of the classifier, likewise.
    config.finetune.num_epochs = 20  # Epochs of the fine-tuning.
    config.finetune.batch_size = 256  # Its batch size.
    config.finetune.momentum = 0.9  # Its momentum.
    config.finetune.weight_decay = 0.0  # Its weight decay.

    # Measures of the backbone during the pre-training, on a fixed subset of the images of
    # evaluation.train.
    config.online = config_dict.ConfigDict()
    config.online.every_steps = 0  # Interval, from step 0 on; 0 disables them.
    # Logged as online_knn etc.: knn, rankme and lidar, or some of them.
    config.online.measures = ("knn", "rankme")
    config.online.num_images = 5000  # Images for knn and rankme; a fifth are queries.
    config.online.view_images = 512  # Images for lidar.
    config.online.num_views = 10  # Training views of each image for lidar.

    # A linear classifier that is trained during the pre-training, without affecting it.
    config.online_probe = config_dict.ConfigDict()
    # Logs online_top1; costs a forward pass of its batch.
    config.online_probe.enabled = False
    # Labeled images, named like evaluation.train. "": those of evaluation.train.
    config.online_probe.train = ""
    config.online_probe.every_steps = 1  # Interval of its steps.
    config.online_probe.batch_size = 256  # Its batch size.
    config.online_probe.learning_rate = 0.03  # Its learning rate.
    config.online_probe.momentum = 0.9  # Its momentum.
    config.online_probe.weight_decay = 1e-3  # Its weight decay.
    config.lock()
    for group in (config.backbone, config.dataset, config.objective):
        group.options.unlock()
    return config


def set_views(config: config_dict.ConfigDict, **augmentation: Any) -> None:
    """Sets fields of the augmentation of both views and of the local views.

    Args:
      config: The config to change.
      **augmentation: Fields of `config.augmentation.view_1` by name.
    """
    for view in ("view_1", "view_2", "local"):
        config.augmentation[view].update(augmentation)


def is_free(field: str) -> bool:
    """Returns whether the field of a dotted name may change when a run resumes."""
    free = (*FREE_FIELDS, *_REMOVED_GROUPS)
    return any(field == name or field.startswith(name + ".") for name in free)


def descriptions() -> dict[str, str]:
    """Returns the description of each field and group by dotted name, in the order of definition.

    The description is the comment before the line that sets the field, or at its end; "" if there
    is none.
    """
    found: dict[str, str] = {}
    setting = r"((?:    # .*\n)*)    (config|view)\.([\w.]+) = .*?(?:  # (.*))?\n"
    for before, of, name, behind in re.findall(setting, inspect.getsource(default_config)):
        name = name if of == "config" else f"augmentation.view_1.{name}"
        found[name] = behind or " ".join(before.replace("    # ", "").split())
        if name in ("augmentation.view_2", "augmentation.local"):
            view = {key: found[key] for key in found if key.startswith("augmentation.view_1.")}
            found |= {key.replace("augmentation.view_1", name): text for key, text in view.items()}
    return found
