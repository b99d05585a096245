"""What a config's fields are called and what they mean, read from the place where they are set."""

import ast
import inspect
import io
import shlex
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import config_dict

from music_jax import config as config_lib
from music_jax.config.evaluation import add_evaluation
from music_jax.data.augment import ViewAugmentation

_WIDTH = 100


class Field(NamedTuple):
    """A field that every config has, or a group of fields.

    Attributes:
      name: dotted, without the leading `config.`.
      default: its value; None if it has none, and for a group.
      meaning: in a few words; "" where the name says it.
      choices: the names that it can take, if it takes names.
      is_group: whether it is a group.
    """

    name: str
    default: Any
    meaning: str
    choices: tuple[str, ...]
    is_group: bool


def fields(config: config_dict.ConfigDict | None = None) -> list[Field]:
    """All fields and groups, each group before its fields, in the order in which they are set.

    Args:
      config: has the values to give in place of the defaults.
    """
    meanings: dict[str, str] = {}
    for name, meaning in (
        *_comments(config_lib.default_config).items(),
        *_comments(add_evaluation).items(),
    ):
        meanings[name] = meaning
        if name == "augmentation":
            for view in ("view_1", "view_2"):
                meanings[f"augmentation.{view}"] = ""
                for field, what in _attributes(ViewAugmentation).items():
                    meanings[f"augmentation.{view}.{field}"] = what
    choices = config_lib.choices()
    place = {name: i for i, name in enumerate(meanings)}  # a config itself sorts them by name
    found = [
        Field(
            name,
            None if isinstance(value, dict) else value,
            meanings.get(name, ""),
            tuple(str(choice) for choice in choices.get(name, ())),
            isinstance(value, dict),
        )
        for name, value in _named((config or config_lib.default_config()).to_dict())
    ]
    return sorted(found, key=lambda field: place.get(field.name, len(place)))


def table(config: config_dict.ConfigDict | None = None) -> str:
    """All fields with their values and meanings, for a terminal.

    Args:
      config: has the values; None for the defaults.
    """
    found, lines = fields(config), []
    values = {field.name: field.default for field in found}
    same_views = all(
        value == values[name.replace("view_2", "view_1")] for name, value in values.items()
    )
    for field in found:
        if field.name.startswith("augmentation.view_2.") and same_views:
            continue
        if field.is_group:
            meaning = "as view_1" if same_views and field.name.endswith("view_2") else field.meaning
            lines += ["", f"config.{field.name}" + (f": {meaning}" if meaning else "")]
            continue
        indent = "  " if "." in field.name else ""
        known = "" if all(c in field.meaning for c in field.choices) else "|".join(field.choices)
        said = "; ".join(part for part in (field.meaning, known) if part)
        line = f"{indent}--config.{field.name}={as_given(field.default)}"
        if said and len(line) + len(said) + 2 <= _WIDTH:
            line += f"  {said}"
        elif said:
            margin = indent + "    "
            line += "\n" + textwrap.fill(
                said, _WIDTH, initial_indent=margin, subsequent_indent=margin
            )
        lines.append(line)
    return "\n".join(lines)


def as_given(value: Any) -> str:
    """A value as the command line takes it; nothing for None."""
    return "" if value is None else shlex.quote(str(value)) if value != "" else ""


def _named(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{key}.")


def _comments(function: Callable[..., Any]) -> dict[str, str]:
    """The comments on the assignments to `config.NAME`, by NAME: those before, and those behind."""
    source = textwrap.dedent(inspect.getsource(function))
    comments: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            comments[line] = token.string.lstrip("# ")
            if not token.line[: token.start[1]].strip():
                alone.add(line)
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
            continue
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        said = " ".join(comments[n] for n in range(first, node.lineno))
        parts = [said, comments.get(node.end_lineno or node.lineno, "")]
        name = ast.unparse(node.targets[0]).removeprefix("config.")
        found[name] = "; ".join(part.rstrip(".") for part in parts if part)
    return found


def _attributes(cls: type) -> dict[str, str]:
    """What a dataclass's docstring says of its attributes."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(section).splitlines():
        if line.startswith(" "):
            found[name] += " " + line.strip()
        elif ": " in line:
            name, _, found[name] = line.partition(": ")
    order = cls.__dataclass_fields__  # type: ignore[attr-defined]
    return {field: found[field].rstrip(".") for field in order if field in found}
