"""What readers of the repository see first: README, citation, changelog and workflows."""

import re

import pytest
import yaml
from processes import ROOT

from music_jax import __version__

_WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_readme_is_short_and_its_links_exist():
    text = _read("README.md")
    assert len(text.split()) <= 900
    links = re.findall(r"\]\(([^)#]+)", text)
    local = [link for link in links if not link.startswith("https://")]
    assert len(local) > 10
    for link in local:
        assert (ROOT / link).exists(), link


def test_figures_of_the_readme_are_among_the_measurements():
    table = _read("README.md").partition("## Results")[2].partition("[All")[0]
    values = [cell.strip() for row in table.splitlines()[4:] for cell in row.split("|")[2:4]]
    measured = _read("docs/measured.md")
    assert len(values) >= 10
    for value in values:
        number = re.escape(value.split()[0])  # without its unit
        assert re.search(rf"(?<![\d.]){number}(?!\d)", measured), value


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load(_read("CITATION.cff"))
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", __version__)
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Niu", "Wang"]
    assert paper["url"].removeprefix("https://arxiv.org/abs/") in _read("README.md")
    assert __version__ in _read("CHANGELOG.md")


@pytest.mark.parametrize("path", _WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_their_actions_and_may_only_read(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    allowed = {"deploy": {"pages": "write", "id-token": "write"}}
    for name, job in workflow["jobs"].items():
        assert job.get("permissions") == allowed.get(name)
        assert job["timeout-minutes"] > 0
        for step in job["steps"]:
            assert "run" in step or re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"])


def test_ci_runs_what_must_pass():
    (job,) = yaml.safe_load(_read(".github/workflows/ci.yml"))["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs == [runs[0], ".ci/run"]
    assert runs[0].startswith("git config ")  # the container is not the owner of the checkout
    build = yaml.safe_load(_read(".github/workflows/docs.yml"))["jobs"]["build"]
    command = re.search(r"sphinx.*docs$", _read(".ci/run"), re.MULTILINE)[0]
    assert command in "".join(step.get("run", "") for step in build["steps"])


def test_one_command_changes_every_address_of_the_repository():
    command = re.search(r"sed -i 's\|(.+)\|OWNER/NAME\|g' ((?:.+\n)+)", _read("launch/README.md"))
    address, patterns = command[1], command[2].replace("\\\n", "").split()
    named = {path for pattern in patterns for path in ROOT.glob(pattern)}
    folders = ("docs", "launch", "tests", "music_jax", "configs", ".github")
    files = [*ROOT.iterdir(), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    texts = {".md", ".ipynb", ".py", ".cfg", ".toml", ".yml", ".yaml", ".cff", ".sh", ".html"}
    found = {
        path
        for path in files
        if path.suffix in texts and address in path.read_text(encoding="utf-8")
    }
    assert found - {ROOT / "launch" / "README.md"} == named
