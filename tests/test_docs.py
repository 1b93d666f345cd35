"""The documents name what exists: every path, command, flag and format_version; and every command is documented."""

import re
from pathlib import Path

import pytest

from lpo.__main__ import build_parser

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = build_parser()._subparsers._group_actions[0].choices


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_that_are_named_exist(path):
    rooms = "app|lpo|storage|tests|benchmarks|docs"
    named = set(re.findall(rf"`((?:{rooms})/[\w./*-]*)`", path.read_text()))
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("/")))]
    assert missing == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_and_flags_that_are_named_exist(path):
    for line in re.findall(r"python -m lpo ([^`\n]*)", path.read_text()):
        commands = re.match(r"[\w-]+(?: \| [\w-]+)*", line)
        if commands is None:  # "python -m lpo ..." in running text
            continue
        for command in commands[0].split(" | "):
            assert command in PARSERS, line
            known = {flag for action in PARSERS[command]._actions for flag in action.option_strings}
            assert set(re.findall(r"--[\w-]+", line)) <= known, line


def test_every_command_is_documented():
    text = "".join(path.read_text() for path in DOCS)
    assert [command for command in PARSERS if not re.search(rf"`[^`\n]*\b{command}\b|lpo {command}\b", text)] == []
    formats = (ROOT / "docs" / "formats.md").read_text()
    choices = next(a for a in PARSERS["export"]._actions if a.dest == "format").choices
    assert [name for name in choices if name not in formats] == []


def test_versions_in_the_table_are_those_of_the_code():
    rows = re.findall(r"^\|[^|]*\|[^|]*\| (\d+) \| `([^`]+)` \|$", (ROOT / "docs" / "formats.md").read_text(), re.M)
    assert len(rows) >= 8
    for version, name in rows:
        source = (ROOT / name).read_text()
        said = re.findall(r'FORMAT_VERSION = (\d+)|"format_version": (\d+)|format_version", 1\) != (\d+)', source)
        numbers = {number for each in said for number in each if number}
        assert numbers == {version}, name
