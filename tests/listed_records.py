"""Sources whose records a test gives as a list."""

from music_jax.data.sources import Source


def list_source(name, records, num_classes=0, class_names=(), **fields):
    """A source of records: a list of dictionaries, or an object with `len()` and `[index]`."""
    read = records.__getitem__
    return Source(
        name, len(records), read, num_classes=num_classes, class_names=class_names, **fields
    )
