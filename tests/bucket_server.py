"""Serves a bucket from memory with gcp-storage-emulator, extended by the requests of Orbax.

    python tests/bucket_server.py

prints its address, and ends when its standard input does. The bucket is called `bucket`.
"""

import contextlib
import sys

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_download = objects.download


def _download_with_generation(request, response, storage, *args, **kwargs):
    """Returns the generation of the object that was read, as Cloud Storage does."""
    with contextlib.suppress(NotFound):
        about = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = about["generation"]
    return _download(request, response, storage, *args, **kwargs)


objects.download = _download_with_generation

from gcp_storage_emulator.server import create_server  # noqa: E402  # it keeps the handlers


def main() -> None:
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.socket.getsockname()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
