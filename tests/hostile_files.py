"""Test cases for each kind of untrusted input, as `TARGETS`: name to `case(rng, directory)`.

A case writes hostile files into its empty directory, beside which `outside` lies with a secret that
it must not reach, and reads them as the package does. It returns, or raises `MusicError`.
"""

import contextlib
import fcntl
import functools
import io
import json
import math
import os
import pathlib
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds
from absl import flags
from etils import epath
from foreign_mutations import array_bomb
from hostile_images import hostile_image, mutated, whole_images
from hostile_json import hostile_json, hostile_value
from listed_records import list_source

from music_jax import cli
from music_jax.checkpoint.integrity import CHECKSUMS, write_checksums
from music_jax.checkpoint.manager import Checkpoints
from music_jax.config import default_config, differences, field_names, from_json, validate
from music_jax.data import loader, sources, tfds_source
from music_jax.data.crops import Crop, center_crop
from music_jax.data.datasets import open_path
from music_jax.data.decode import decode, largest_reduction, read_header
from music_jax.data.folder import open_folder
from music_jax.data.order import TrainingOrder
from music_jax.data.packing import Packing, pack, shrink
from music_jax.data.skipped import SkippedImages
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UndecodableError, UserError
from music_jax.evaluation.features import Expected, cached_arrays
from music_jax.evaluation.protocols import provenance, read_final_results
from music_jax.evaluation.results import read_predictions, results_table
from music_jax.exchange.importing import import_backbone
from music_jax.report import measures
from music_jax.train.guards import init_guard_state
from music_jax.train.state import TrainState, restore_state, save_state
from music_jax.workdir import lock as lock_module
from music_jax.workdir.directory import open_workdir
from music_jax.workdir.files import write_json
from music_jax.workdir.lock import WorkdirLock
from music_jax.workdir.logs import MetricsLog
from music_jax.workdir.run_config import as_json, read_config

SECRET = b"not to be read or written"


@functools.cache
def _kept(name: str) -> pathlib.Path:
    """Returns a directory for files that are made once and copied by each case."""
    return pathlib.Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))


def images(rng: random.Random, directory: pathlib.Path) -> None:
    encoded = hostile_image(rng)
    channels, use = rng.choice((1, 3)), rng.randrange(4)
    if use == 0:
        source = list_source("fuzz", [{"image": encoded, "label": 0}], 1)
        order = TrainingOrder(1, 1, rng.randrange(100))
        crop = rng.choice((Crop(16), Crop(16, (1.0, 1.0), (1.0, 1.0))))
        views = {"images": (crop, 2), "local_images": (Crop(8), 1)}
        batches = loader._TrainingBatches(
            source, order, views, channels, np.dtype(np.uint8), np.arange(1), True, None
        )
        batch = batches.new()
        batches.fill(0, batch, range(1))
        assert batch["images"].shape == (1, 2, 16, 16, channels)
        assert batch["local_images"].shape == (1, 1, 8, 8, channels)
    elif use == 1:
        decode(shrink(encoded, Packing(shorter_side=8, channels=channels)), channels)
    else:
        header = read_header(encoded)
        reduction = largest_reduction(header, rng.choice((1, 2, 4, 8)))
        image = decode(encoded, channels, header=header, reduction=reduction)
        assert center_crop(image, 16, 20).shape == (16, 16, channels)


def config_json(rng: random.Random, directory: pathlib.Path) -> None:
    record = {"config": as_json(default_config()), "versions": {}}
    (directory / "config.json").write_bytes(hostile_json(rng, record))
    saved = read_config(open_workdir(str(directory)))
    differences(saved, record["config"])
    validate(from_json(saved))


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(field_names(default_config()))


def config_flag(rng: random.Random, directory: pathlib.Path) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=values)
    flags.DEFINE_boolean("helpfields", False, "", flag_values=values)
    argv = ["fuzz"]
    for _ in range(rng.randrange(1, 4)):
        value = hostile_value(rng)
        text = json.dumps(value).replace("[", "(").replace("]", ")") if value else str(value)
        if rng.random() < 0.1:
            text = rng.choice(("(" * 5000, "__import__('os').system('x')", "1_0", "0x10", "(1,"))
        argv.append(f"--config.{rng.choice((*_fields(), 'x', '', 'a.b'))}={text}")
    before, flags.FLAGS = flags.FLAGS, values
    try:
        cli.parse(argv, "", "fields")
        validate(values.config)
    finally:
        flags.FLAGS = before


def metrics(rng: random.Random, directory: pathlib.Path) -> None:
    lines = [json.dumps({"step": i, "loss": 1.5}).encode() for i in range(6)]
    for _ in range(3):
        lines[rng.randrange(6)] = hostile_json(rng, {"step": 3, "loss": 0.25})
    (directory / "metrics.jsonl").write_bytes(b"\n".join(lines))
    log = MetricsLog(open_workdir(str(directory)), 4)
    log.write({"step": 5})
    log.close()
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        assert 0 <= json.loads(line)["step"] <= 5


def results(rng: random.Random, directory: pathlib.Path) -> None:
    config = default_config()
    linear = {"top1": 0.5, "top5": 0.75, "raw_pixels_top1": None, "random_init_top1": 0.25}
    images = ["train 1", "test 2"]
    linear |= provenance("linear", config, 3) | {"images_fingerprint": images}
    knn = {"top1": 0.5, "top1_by_k": {"20": 0.5}, "raw_pixels_top1": 0.5}
    knn |= provenance("knn", config, 3) | {"images_fingerprint": images}
    damaged = rng.randrange(2)
    texts = [
        hostile_json(rng, r) if i == damaged else json.dumps(r).encode()
        for i, r in enumerate((linear, knn))
    ]
    (directory / "linear_eval.json").write_bytes(texts[0])
    (directory / "knn.json").write_bytes(texts[1])
    found = read_final_results(config, epath.Path(directory), 3, images)
    if found is not None:
        results_table(found)


def skipped(rng: random.Random, directory: pathlib.Path) -> None:
    line = {"source": "fuzz", "image": "a.jpg", "reason": "it is broken"}
    for name in ("skipped.jsonl", "skipped.process_1.jsonl"):
        lines = [hostile_json(rng, line) for _ in range(rng.randrange(4))]
        (directory / name).write_bytes(b"\n".join(lines))
    noted = SkippedImages(epath.Path(directory), max_share=rng.choice((0.0, 1.0)))
    noted.merge()
    noted.summary()
    noted.add(list_source("fuzz", [{}] * 3, 0), 1, "broken")


def lock(rng: random.Random, directory: pathlib.Path) -> None:
    record = {"host": "a", "pid": 1, "started": "2026-01-01"}
    (directory / "lock").write_bytes(hostile_json(rng, record))
    with (directory / "lock").open() as file:
        if rng.random() < 0.5:
            fcntl.flock(file, fcntl.LOCK_EX)
        # As long as a record of another host is watched for signs of life
        with (
            mock.patch.object(lock_module, "_SILENT_SECONDS", 0.0),
            WorkdirLock(epath.Path(directory)),
        ):
            pass


_NAMES = (b"a", b"b.jpg", b"c.PNG", b"new\nline.gif", b"\xff\xfe.jpg", b"x" * 240 + b".webp",
          b".hidden.jpg", b" ", b"\x1b[31m.bmp", b"..jpg", b"-rf.jpg", b"d")  # fmt: skip


def _hostile_tree(rng: random.Random, root: bytes, depth: int = 0) -> None:
    """Files, links, pipes and folders under odd names."""
    for name in rng.sample(_NAMES, rng.randrange(1, 6)):
        path, kind = os.path.join(root, name), rng.randrange(8)
        if kind < 3:
            with open(path, "wb") as file:
                file.write(rng.choice((whole_images()[4], hostile_image(rng), b"")))
        elif kind == 3:
            os.mkfifo(path)
        elif kind == 4 and depth < 3:
            os.mkdir(path)
            _hostile_tree(rng, path, depth + 1)
        else:
            ups = b"../" * rng.randrange(4)
            to = rng.choice((name, b".", ups, ups + rng.choice(_NAMES), ups + b"outside",
                             ups + b"outside/secret.png", b"/dev/zero", b"/etc", b"/"))  # fmt: skip
            os.symlink(to or b".", path)


def folder(rng: random.Random, directory: pathlib.Path) -> None:
    _hostile_tree(rng, os.fsencode(directory))
    source = open_folder(str(directory))
    for i in range(len(source)):
        source.record_name(i).encode()
        try:
            source.example(i)
        except UndecodableError:
            continue
    source.fingerprint(times=True)


_WORKDIR_NAMES = (
    "config.json",
    "metrics.jsonl",
    "skipped.jsonl",
    "lock",
    ".writable.0",
    "damaged",
    "checkpoints",
    "config.json.new",
    "metrics.jsonl.new",
    "linear_eval.json",
)


def workdir(rng: random.Random, directory: pathlib.Path) -> None:
    for name in rng.sample(_WORKDIR_NAMES, rng.randrange(1, 5)):
        kind = rng.randrange(6)
        if kind == 0:
            os.mkfifo(directory / name)
        elif kind == 1:
            (directory / name).mkdir()
        elif kind == 2:
            (directory / name).write_bytes(rng.randbytes(40))
        else:
            to = ("../outside/secret.png", "../outside/new", "../outside", name, "config.json")
            (directory / name).symlink_to(rng.choice(to))
    where = open_workdir(str(directory))
    try:
        read_config(where)
        with WorkdirLock(where):
            write_json(where / "config.json", {})
            SkippedImages(where, max_share=1.0)
            MetricsLog(where, 3).close()
    except OSError as error:  # a directory in a file's place: named, as the commands do not yet
        raise UserError(str(error)) from error


@functools.cache
def _packed() -> pathlib.Path:
    photos, packed = _kept("photos"), _kept("packed")
    for i in range(6):
        path = photos / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(whole_images()[4])
    packing = Packing(shorter_side=16, shard_size=4)
    pack(open_folder(str(photos)), epath.Path(packed), packing, num_threads=1)
    return packed


def packs(rng: random.Random, directory: pathlib.Path) -> None:
    shutil.copytree(_packed(), directory, dirs_exist_ok=True)
    shards = sorted(directory.glob("*.array_record"))
    if rng.random() < 0.5:
        index = json.loads((directory / "index.json").read_text())
        (directory / "index.json").write_bytes(hostile_json(rng, index))
    else:
        shard = rng.choice(shards)
        content = mutated(rng, shard.read_bytes())
        shard.unlink()
        if rng.random() < 0.1:
            shard.symlink_to("../outside/secret.png")
        elif rng.random() < 0.1:
            os.mkfifo(shard)
        else:
            shard.write_bytes(content)
    source = open_path(str(directory))
    _read_all(source, 12)


def _read_all(source: sources.Source, most: int) -> None:
    for i in range(min(len(source), most)):
        try:
            encoded, label = source.example(i)
            assert -1 <= label < max(source.num_classes, 1)
            decode(encoded, 1)
        except UndecodableError:
            continue


@functools.cache
def _prepared() -> pathlib.Path:
    dataset = default_config().dataset
    dataset.name, dataset.data_dir = "digits", str(_kept("tfds"))
    tfds_source.prepare(dataset)
    return _kept("tfds")


def tfds_files(rng: random.Random, directory: pathlib.Path) -> None:
    shutil.copytree(_prepared() / "digits", directory / "digits")
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    file = rng.choice(files)
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.7:
        file.write_bytes(hostile_json(rng, json.loads(content)))
    else:
        file.write_bytes(mutated(rng, content))
    dataset = default_config().dataset
    dataset.name, dataset.data_dir = "digits", str(directory)
    _read_all(tfds_source.open_split(dataset, "test"), 3)


def _state() -> TrainState:
    params = {"kernel": jnp.ones((8, 4)), "bias": jnp.arange(5.0)}
    return TrainState(
        step=jnp.asarray(7, jnp.int32),
        params=params,
        batch_stats={"mean": jnp.arange(3.0)},
        opt_state=optax.trace(0.9).init(params),
        guard=init_guard_state(),
    )


@functools.cache
def _saved() -> pathlib.Path:
    writer = Checkpoints(epath.Path(_kept("checkpoint")))
    save_state(writer, 7, _state(), TrainingOrder(32, 16, 0))
    writer.close()
    return _kept("checkpoint")


def checkpoints(rng: random.Random, directory: pathlib.Path) -> None:
    """Damaged, or tampered with and sealed again with the right checksums."""
    shutil.copytree(_saved(), directory, dirs_exist_ok=True)
    step = directory / "checkpoints" / "7"
    files = sorted(path for path in step.rglob("*") if path.is_file())
    metadata = [path for path in files if path.stat().st_size and "d" not in path.parts[-2:-1]]
    file = rng.choice(rng.choice((files, metadata)))
    content = file.read_bytes()
    try:
        file.write_bytes(hostile_json(rng, json.loads(content)))
    except ValueError:
        file.write_bytes(mutated(rng, content))
    if rng.random() < 0.1:
        file.unlink()
        rng.choice((os.mkfifo, lambda path: path.symlink_to("../" * 4 + "outside/new")))(file)
    elif rng.random() < 0.7 and file.name != CHECKSUMS:
        try:
            write_checksums(epath.Path(step))
        except ValueError:
            return
    reader = Checkpoints(epath.Path(directory), read_only=rng.random() < 0.5)
    try:
        found = reader.latest_valid_step()
        if found is not None:
            order = TrainingOrder(32, 16, 0)
            restore_state(reader, found, jax.eval_shape(_state), make_data_mesh(), order)
    finally:
        reader.close()


def archives(rng: random.Random, directory: pathlib.Path) -> None:
    """A tar as TFDS goes through those of ImageNet: one in another, read and never extracted."""
    import io
    import tarfile

    def tar(count: int, inner: bool) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for _ in range(count):
                names = ("n01440764.tar", "../../outside/new", "/etc/x", "a/../../outside/new", ".")
                info = tarfile.TarInfo(rng.choice(names))
                info.type = rng.choice(
                    (tarfile.REGTYPE,) * 4 + (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)
                )
                info.linkname = rng.choice(("../outside/secret.png", info.name, "/etc/passwd"))
                content = tar(2, False) if inner else b"image"
                info.size = len(content) if info.type == tarfile.REGTYPE else 0
                archive.addfile(info, io.BytesIO(content))
        return out.getvalue()

    file = directory / "train.tar"
    content = tar(3, True)
    file.write_bytes(mutated(rng, content) if rng.random() < 0.7 else content)
    extract = tfds.core.download.extractor
    method = tfds.core.download.resource.ExtractMethod.TAR_STREAM
    try:
        for _, inner in extract.iter_archive(str(file), method):
            copy = io.BytesIO(inner.read())
            for _, image in extract.iter_archive(copy, method):
                assert image.read() != SECRET
    except AssertionError:
        raise
    except Exception as error:  # as `tfds_source.prepare` does
        raise UserError(str(error)) from error
    finally:
        left = {path.name for path in directory.iterdir()}
        assert left == {"train.tar"}, left


def arrays(rng: random.Random, directory: pathlib.Path) -> None:
    """The linear probe's predictions, and an array of the feature cache."""
    labels = np.asarray([0, 1, 2, rng.choice((2, 50, 40_000, 2**40))])
    file = io.BytesIO()
    np.savez(file, indices=np.arange(4), labels=labels, predictions=labels, step=np.asarray(2))
    whole = file.getvalue()
    (directory / "linear_eval.npz").write_bytes(
        mutated(rng, whole) if rng.random() < 0.7 else whole
    )
    if rng.random() < 0.3:
        with zipfile.ZipFile(directory / "linear_eval.npz", "w", rng.choice((0, 8))) as archive:
            for name in ("indices", "labels", "predictions", "step"):
                archive.writestr(f"{name}.npy", array_bomb(rng))
    with contextlib.suppress(ValueError):
        found = read_predictions(epath.Path(directory))
        measures.count_confusions(found, ["a"])
    features = epath.Path(directory) / "features"
    expected = {"labels": Expected((9,), np.int64, range(9))}

    def kept() -> np.ndarray:
        arrays = {"labels": np.arange(4)}
        return cached_arrays(features, "a", {}, lambda: arrays, expected=expected)["labels"]

    kept()
    (path,) = directory.glob("features/*.npz")
    if rng.random() < 0.5:
        with zipfile.ZipFile(path, "w", rng.choice((0, 8))) as archive:
            archive.writestr("labels.npy", array_bomb(rng))
    else:
        path.write_bytes(mutated(rng, path.read_bytes()))
    np.testing.assert_array_equal(kept(), np.arange(4))


_TENSORS = (
    *("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "fc.weight"),
    *("cls_token", "patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight", "norm.bias"),
)


def weights(rng: random.Random, directory: pathlib.Path) -> None:
    """A safetensors file of some tensors of a backbone, of any shapes and types."""
    header, content = {}, b""
    for name in rng.sample(_TENSORS, rng.randrange(1, len(_TENSORS))):
        kind, size = rng.choice((*(("F32", 4),) * 5, ("BF16", 2), ("F8_E4M3", 1), ("I64", 8)))
        shape = rng.choice(([64, 3, 7, 7], [1, 1, 384], [384, 3, 16, 16], [1, 5, 384], [64], []))
        count = size * math.prod(shape)
        offsets = [len(content), len(content) + count]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        content += rng.randbytes(count)
    text = hostile_json(rng, header) if rng.random() < 0.3 else json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + content
    file = directory / "weights.safetensors"
    if rng.random() < 0.05:
        os.mkfifo(file)
    else:
        file.write_bytes(mutated(rng, whole) if rng.random() < 0.3 else whole)
    config = default_config()
    config.dataset.name = "digits"
    import_backbone(str(file), str(directory / "run"), config)


TARGETS: dict[str, Callable[[random.Random, pathlib.Path], None]] = {
    "images": images,
    "config.json": config_json,
    "config flags": config_flag,
    "metrics.jsonl": metrics,
    "results": results,
    "skipped.jsonl": skipped,
    "lock": lock,
    "folder": folder,
    "workdir": workdir,
    "packed": packs,
    "tfds": tfds_files,
    "checkpoint": checkpoints,
    "archives": archives,
    "arrays": arrays,
    "weights": weights,
}
# Of a hundred cases, so many are of each: those that take long are fewer.
SHARES = {
    "images": 50,
    "config.json": 9,
    "config flags": 4,
    "metrics.jsonl": 10,
    "results": 6,
    "skipped.jsonl": 8,
    "lock": 3,
    "folder": 4,
    "workdir": 2,
    "packed": 2,
    "tfds": 0.2,
    "checkpoint": 0.3,
    "archives": 1.6,
    "arrays": 3,
    "weights": 0.5,
}
