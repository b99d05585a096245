"""A bucket in memory, reached through `epath` as it is where TensorFlow is not installed."""

import contextlib
import io

import fsspec
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem


class HttpError(Exception):
    """An error of gcsfs, which is no OSError."""


class _FailingReads(io.BytesIO):
    """A file of a connection that breaks."""

    def read(self, size=-1):
        raise Bucket.failing_reads("503, Service Unavailable")


class Bucket(MemoryFileSystem):
    """Objects in memory; as in gcsfs, opening one with mode `a` begins it anew."""

    protocol = ("gs", "gcs")
    cachable = False
    failure = None  # what it answers with
    failing_reads = None  # what an open file answers with

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    def _answer(self):
        if Bucket.failure is not None:
            raise Bucket.failure("503, Service Unavailable")

    def _open(self, path, mode="rb", **kwargs):
        if Bucket.failing_reads is None:
            self._answer()
        file = super()._open(path, mode.replace("a", "w"), **kwargs)
        if Bucket.failing_reads is not None and mode == "rb":
            return _FailingReads()
        return file

    def info(self, path, **kwargs):
        self._answer()
        return super().info(path, **kwargs)

    def exists(self, path, **kwargs):
        self._answer()
        return super().exists(path, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self._answer()
        return super().ls(path, detail, **kwargs)


@contextlib.contextmanager
def bucket_directory(monkeypatch):
    """A directory of the bucket."""
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    directory = epath.Path("gs://bucket/run")
    directory.mkdir(parents=True, exist_ok=True)
    yield directory
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    backend.fsspec_backend._get_filesystem.cache_clear()


@contextlib.contextmanager
def out_of_reach(failure=HttpError):
    """Opens a context in which all requests to the bucket fail."""
    Bucket.failure = failure
    try:
        yield
    finally:
        Bucket.failure = None


@contextlib.contextmanager
def broken_connection(failure=HttpError):
    """Opens a context in which files can be opened, but not read."""
    Bucket.failing_reads = failure
    try:
        yield
    finally:
        Bucket.failing_reads = None
