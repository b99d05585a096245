"""Folders of images of many channels: two classes that differ in the fourth band of thirteen, and
the two classes of sixteen-bit gray images."""

import io

import cv2
import numpy as np
import tifffile

# Sentinel-2's bands have means of hundreds to thousands, with different spreads.
MEANS = np.linspace(200, 3000, 13)
STDS = np.linspace(50, 900, 13)


def bands(rng, kind, side=24):
    """Thirteen channels of reflectances, float32."""
    image = rng.normal(MEANS, STDS, (side, side, 13))
    image[..., 3] += 4 * STDS[3] * (1 if kind else -1) * (np.indices((side, side))[0] % 8 < 4)
    return image.astype(np.float32)


def depth(rng, kind, side=24):
    """One channel of sixteen bits."""
    image = rng.normal(9000, 500, (side, side))
    image += 4000 * (np.indices((side, side))[kind] % 8 < 4)
    return image.astype(np.uint16)


def npy(array):
    """The bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array, **options):
    """The bytes of a TIFF file."""
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def write_bands(folder, count, seed=0):
    """Writes TIFF files in both layouts, and .npy files; returns the images in their order."""
    rng, images = np.random.default_rng(seed), []
    gray = {"photometric": "minisblack"}
    for kind in (0, 1):
        (folder / f"class{kind}").mkdir(parents=True)
        for i in range(count // 2):
            image = bands(rng, kind)
            content = {
                "tif": tiff(image, planarconfig="contig", compression="zlib", **gray),
                "tiff": tiff(image.transpose(2, 0, 1), planarconfig="separate", **gray),
                "npy": npy(image),
            }
            ending = list(content)[i % 3]
            (folder / f"class{kind}" / f"{i:03d}.{ending}").write_bytes(content[ending])
            images.append(image)
    return images


def write_depth(folder, count, seed=0):
    """Writes PNG files of sixteen bits; returns the images in their order."""
    rng, images = np.random.default_rng(seed), []
    for kind in (0, 1):
        (folder / f"class{kind}").mkdir(parents=True)
        for i in range(count // 2):
            images.append(depth(rng, kind))
            content = cv2.imencode(".png", images[-1])[1].tobytes()
            (folder / f"class{kind}" / f"{i:03d}.png").write_bytes(content)
    return images


# Fields of a short training on such a set.
SMALL = (
    "--config=folder",
    "--config.batch_size=16",
    "--config.num_epochs=2",
    "--config.optimizer.warmup_epochs=1",
    "--config.compute_dtype=float32",
    "--config.log_every_steps=1",
    "--config.objective.num_segments=4",
    "--config.objective.units_per_segment=8",
    "--config.projector.hidden_sizes=()",
    "--config.backbone.name=tiny_resnet",
    "--config.crop.size=16",
    "--config.crop.eval_resize=20",
    "--config.linear_eval.num_epochs=10",
    "--config.linear_eval.batch_size=16",
    "--config.linear_eval.base_learning_rates=(0.1,)",
)
BANDS = ("--config.dataset.num_channels=13", "--config.dataset.pixel_type=float32")
DEPTH = ("--config.dataset.num_channels=1", "--config.dataset.pixel_type=uint16")
NO_STATISTICS = "--config.dataset.mean=()"
