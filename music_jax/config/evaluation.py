"""The config's fields for what is measured: none of them changes what is trained."""

from ml_collections import config_dict


def add_evaluation(config: config_dict.ConfigDict) -> None:
    """Adds the parts that say how a backbone is evaluated, with their defaults."""
    # What is probed, if not the dataset's own splits: a labeled folder, or NAME:SPLIT of TFDS.
    config.evaluation = config_dict.ConfigDict()
    config.evaluation.train = ""  # "": the images of the pre-training
    config.evaluation.test = ""  # "": dataset.test_split; with dataset.path, there is no probe
    config.evaluation.batch_size = 256  # of images whose features are computed at once
    config.evaluation.view_images = 1024  # whose training views are compared (LiDAR, alignment)
    config.evaluation.num_views = 10  # of each of them

    config.linear_eval = config_dict.ConfigDict()
    config.linear_eval.num_epochs = 100
    config.linear_eval.batch_size = 256
    config.linear_eval.base_learning_rates = (0.02,)  # times batch_size / 256; the best is taken
    config.linear_eval.momentum = 0.9
    config.linear_eval.weight_decay = 1e-6
    config.linear_eval.drop_epochs = ()  # () for a cosine; else a tenth after each of them
    config.linear_eval.random_crops = True  # new crops and flips each epoch; else one center view
    config.linear_eval.feature_scaling = "none"  # or standardize or whiten, by the training split
    config.linear_eval.validation_fraction = 0.1  # of the training split, to choose the rate
    config.linear_eval.raw_pixels = False  # the same probe on raw pixels, for comparison
    config.linear_eval.random_init = False  # and on the backbone before training

    config.knn = config_dict.ConfigDict()
    config.knn.enabled = True  # holds the features of the whole training split in memory
    config.knn.k = 20
    config.knn.more_k = (10, 200)  # reported beside it
    config.knn.temperature = 0.07

    config.few_shot = config_dict.ConfigDict()
    config.few_shot.shots = (1, 5, 10)  # labeled samples a class
    config.few_shot.draws = 20
    config.few_shot.inverse_regularization = 1.0  # scikit-learn's C, times the samples drawn

    config.semi_supervised = config_dict.ConfigDict()  # fine-tuning on a part of the labels
    config.semi_supervised.fractions = (0.01, 0.1)
    # Files that name the images of each fraction, one a line, such as SimCLR's for ImageNet; "" for
    # a stratified draw.
    config.semi_supervised.lists = ("", "")
    config.semi_supervised.backbone_learning_rates = (0.03, 0.01)  # times batch_size / 256
    config.semi_supervised.head_learning_rates = (0.08, 0.1)
    config.semi_supervised.num_epochs = 20
    config.semi_supervised.batch_size = 256
    config.semi_supervised.momentum = 0.9
    config.semi_supervised.weight_decay = 0.0

    config.finetune = config_dict.ConfigDict()  # on all labels
    config.finetune.backbone_learning_rate = 0.01  # times batch_size / 256
    config.finetune.head_learning_rate = 0.1
    config.finetune.num_epochs = 20
    config.finetune.batch_size = 256
    config.finetune.momentum = 0.9
    config.finetune.weight_decay = 0.0

    config.retrieval = config_dict.ConfigDict()
    config.retrieval.max_gallery = 200_000  # training images, at random, that are ranked

    config.online_probe = config_dict.ConfigDict()  # a classifier beside the pre-training
    config.online_probe.enabled = False  # logs online_top1; costs a forward pass of its batch
    config.online_probe.train = ""  # labeled images, as evaluation.train; "": those of that
    config.online_probe.every_steps = 1  # of the training's
    config.online_probe.batch_size = 256
    config.online_probe.learning_rate = 0.03
    config.online_probe.momentum = 0.9
    config.online_probe.weight_decay = 1e-3

    config.clustering = config_dict.ConfigDict()
    config.clustering.num_starts = 10  # of k-means on the joint code
