"""TensorFlow as a tool of the host: it never sees an accelerator, and says nothing."""

import contextlib
import os
from typing import Any


def import_tensorflow() -> Any:
    """Imports TensorFlow, which takes some nine seconds, and hides the accelerators from it.

    It would take their memory from JAX.

    Returns:
      The module.

    Raises:
      ImportError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        with contextlib.suppress(RuntimeError):  # somebody else in this process has set it up
            tf.config.set_visible_devices([], kind)
    return tf
