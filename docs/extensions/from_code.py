"""Sphinx directives for the `--help` of the commands and for the fields of a config."""

import concurrent.futures
import inspect
import os
import subprocess
import sys

from docutils import nodes
from docutils.statemachine import StringList
from ml_collections import config_dict
from sphinx.util.docutils import SphinxDirective

from music_jax import cli
from music_jax.config import default_config, descriptions, get_field


class CommandsDirective(SphinxDirective):
    """A section for each command, with its `--help` text."""

    def run(self) -> list[nodes.Node]:
        names = cli.commands()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return [_section(*pair) for pair in zip(names, pool.map(_help, names), strict=True)]


def _help(name: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", f"music_jax.{name}", "--help"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.rstrip()


def _section(name: str, text: str) -> nodes.section:
    section = nodes.section(ids=[name.replace("_", "-")], names=[name])
    section += nodes.title(text=f"music_jax.{name}")
    block = nodes.literal_block(text, text, language="text")
    section += nodes.container("", block, classes=["command-help"])
    return section


class FieldsDirective(SphinxDirective):
    """A section for each group of fields, with a table of them."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(inspect.getsourcefile(default_config))
        config, described = default_config(), descriptions()
        groups: dict[str, list[str]] = {"": []}
        for name, text in described.items():
            value = get_field(config, name)
            if isinstance(value, config_dict.ConfigDict) and not name.endswith(".options"):
                groups[name] = []
            elif not name.startswith(("augmentation.view_2.", "augmentation.local.")):
                value = value.to_dict() if isinstance(value, config_dict.ConfigDict) else value
                text = text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")
                group, _, field = name.rpartition(".")
                groups[group].append(f"| `{field}` | `{value!r}` | {text} |")
        described[""] = "Fields outside the groups below."
        described["augmentation.view_1"] = described["augmentation"]
        return [self._section(n, described[n], rows) for n, rows in groups.items() if rows]

    def _section(self, group: str, description: str, rows: list[str]) -> nodes.section:
        title = f"config.{group}".rstrip(".")
        if group == "augmentation.view_1":
            title += ", view_2 and local"
        section = nodes.section(
            ids=[title.replace(",", "").replace(".", "-").replace(" ", "-")], names=[title]
        )
        section += nodes.title(text=title)
        if description:
            section += nodes.paragraph(text=description)
        lines = ["| field | default | description |", "|---|---|---|", *rows]
        holder = nodes.container(classes=["config-fields"])
        self.state.nested_parse(StringList(lines, source="config"), 0, holder)
        section += holder
        return section


def setup(app):
    app.add_directive("commands", CommandsDirective)
    app.add_directive("config-fields", FieldsDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
