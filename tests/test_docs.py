"""Flags, fields, files and messages in the documentation exist in the code."""

import ast
import concurrent.futures
import json
import pathlib
import re
import subprocess
import sys

import pytest
import snowballstemmer
from processes import ROOT

from music_jax import cli
from music_jax.config import descriptions

_PAGES = sorted([*ROOT.glob("*.md"), ROOT / "launch" / "README.md", *ROOT.glob("docs/**/*.md")])


@pytest.fixture(scope="module")
def commands():
    """The options of each command, as its `--help` lists them."""

    def options(name):
        asked = [sys.executable, "-m", f"music_jax.{name}", "--help"]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        return {"help", *re.findall(r"^ *--(?:\[no\])?([\w.-]+)", told, re.MULTILINE)}

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(cli.commands(), pool.map(options, cli.commands()), strict=True))


@pytest.fixture(scope="module")
def fields():
    return descriptions()


@pytest.mark.parametrize("page", _PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_with_their_flags(page, commands, fields):
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    for name, rest in re.findall(r"python -m music_jax\.(\w+)([^`\n#]*)", text):
        assert name in commands, f"there is no command {name}"
        for flag in re.findall(r"--([\w.-]+)", rest):
            if flag.startswith("config.") and "helpfields" in commands[name]:
                assert flag.removeprefix("config.") in fields, flag
            else:
                assert flag.removeprefix("no") in commands[name] or flag in commands[name], (
                    f"{name} has no --{flag}"
                )


@pytest.mark.parametrize("page", _PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_fields_and_files(page, fields):
    text = page.read_text()
    groups = {name.partition(".")[0] for name in fields if "." in name}
    for name in re.findall(r"`(?:--config\.)?(\w+\.[\w.]+)(?:=[^`]*)?`", text):
        if name.partition(".")[0] in groups and not name.endswith(
            (".json", ".npz", ".py", ".parts")
        ):
            assert name in fields, name
    for name in re.findall(r"--config\.([\w.]+)", text):
        if name[0].islower():
            assert name.rstrip(".") in fields, name
    for path in re.findall(
        r"(?:configs|launch|tests|docs)/[\w/]+\.(?:py|sh|sbatch|md|png|yaml|ipynb)", text
    ):
        assert "NAME" in path or (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def search_index(tmp_path_factory):
    """The index of words that the search of the built documentation reads."""
    site = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-b", "html", ROOT / "docs", site]
    subprocess.run(build, check=True)
    script = (site / "searchindex.js").read_text()
    return json.loads(script.removeprefix("Search.setIndex(").removesuffix(")"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("custom backbone", "how_to/own_parts"),
        ("citation", "method"),
        ("resume", "how_to/resume"),
    ],
)
def test_what_people_look_for_is_found(search_index, query, page):
    stem = snowballstemmer.stemmer("english").stemWord

    def pages(word):
        found = [search_index[kind].get(stem(word), []) for kind in ("terms", "titleterms")]
        numbers = [n for some in found for n in (some if isinstance(some, list) else [some])]
        return {search_index["docnames"][n] for n in numbers}

    assert page in set.intersection(*map(pages, query.split()))


def test_messages_that_are_quoted():
    said = "".join(_texts(path) for path in sorted((ROOT / "music_jax").rglob("*.py")))
    pages = [page for page in _PAGES if page.parts[-2] in ("docs", "how_to")]
    quoted = [
        m for page in pages for m in re.findall(r"```text\nerror: (.*)\n```", page.read_text())
    ]
    assert len(quoted) > 5
    for message in quoted:
        # What stands for a value: dots, numbers, and what is joined from several messages.
        for part in re.split(r"\.\.\.|config\.\w+ =|\d+|;| and | at |\?", message):
            assert part.strip(" .()") in said, part


def _texts(path: pathlib.Path) -> str:
    """All texts of a module, those in several pieces joined."""
    pieces = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            pieces.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            values = [v.value for v in node.values if isinstance(v, ast.Constant)]
            pieces.append("".join(str(value) for value in values))
    return "\n".join(pieces)
