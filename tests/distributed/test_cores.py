"""How the C library's memory is divided among threads."""

import subprocess
import sys

_SCRIPT = """
import ctypes, os, sys, tempfile, threading
from music_jax.distributed import limit_malloc_arenas

limit_malloc_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier(8)

def allocate():
    libc.malloc(100_000)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count(b"<heap nr="))
"""


def _arenas(**environment):
    command = [sys.executable, "-c", _SCRIPT]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(found.stdout)


def test_all_threads_share_two_arenas_unless_the_user_sets_another_number():
    assert _arenas() <= 2
    assert _arenas(MALLOC_ARENA_MAX="8") > 2
