"""Directives whose text is the code's own: the commands' `--help`, and the fields of a config."""

import concurrent.futures
import os
import subprocess
import sys

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from music_jax import cli
from music_jax.config import fields as config_fields


class CommandsDirective(SphinxDirective):
    """A section for each command, with what its `--help` prints."""

    def run(self) -> list[nodes.Node]:
        names = cli.commands()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return [_section(*told) for told in zip(names, pool.map(_help, names), strict=True)]


def _help(name: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    asked = [sys.executable, "-m", f"music_jax.{name}", "--help"]
    return subprocess.run(
        asked, env=environment, capture_output=True, text=True, check=True
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
        groups: dict[str, list[config_fields.Field]] = {"": []}
        meanings = {"": "Fields that are in no group."}
        for field in config_fields.fields():
            if field.is_group:
                groups[field.name], meanings[field.name] = [], field.meaning
            elif not field.name.startswith("augmentation.view_2."):
                groups[field.name.rpartition(".")[0]].append(field)
        sections = []
        for name, fields in groups.items():
            if fields:
                title = f"config.{name}" if name else "config"
                if name == "augmentation.view_1":
                    title += " and view_2"
                sections.append(self._section(title, meanings[name], fields))
        return sections

    def _section(self, title: str, meaning: str, fields: list) -> nodes.section:
        section = nodes.section(ids=[title.replace(".", "-").replace(" ", "-")], names=[title])
        section += nodes.title(text=title)
        if meaning:
            section += nodes.paragraph(text=f"{meaning[0].upper()}{meaning[1:].rstrip('.')}.")
        rows = [_row(field) for field in fields]
        lines = ["| field | default | |", "|---|---|---|", *rows]
        holder = nodes.container()
        self.state.nested_parse(StringList(lines, source="config"), 0, holder)
        section += holder.children
        return section


def _row(field: config_fields.Field) -> str:
    default = f"`{field.default!r}`" if field.default is not None else ""
    known = ", ".join(f"`{choice}`" for choice in field.choices)
    meaning = field.meaning.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")
    said = "; ".join(part for part in (meaning, known and f"one of {known}") if part)
    return f"| `{field.name.rpartition('.')[2]}` | {default} | {said} |"


def setup(app):
    app.add_directive("commands", CommandsDirective)
    app.add_directive("config-fields", FieldsDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
