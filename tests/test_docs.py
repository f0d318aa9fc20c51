"""The README and the pages of docs/ say what is there: links, files, make targets, commands, Python names."""

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from common import architectures
from common.commands.main import app
from common.pytest_plugin import OPTIONS, Parity

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str = "") -> list[str]:
    """The code blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands between backticks in the text of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings answer to."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `resnet-parity` command that a page shows, without the command's own name."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    for text in [*lines, *spans(page)]:
        words = shlex.split(text, comments=True) if "resnet-parity " in text else []
        if "resnet-parity" in words and words[-1] != "resnet-parity":
            yield words[words.index("resnet-parity") + 1 :]


def make_targets() -> set[str]:
    return set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]


def test_the_readme_is_short() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not fragment or fragment in anchors(target), link


def test_the_readme_leads_to_every_page() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[0]))}
    assert set(PAGES[1:]) <= linked


def test_the_readme_says_what_every_make_target_does() -> None:
    rows = re.findall(r"^\| `make ([\w-]+)` \|", PAGES[0].read_text(), re.MULTILINE)
    assert set(rows) == make_targets() - {"clean"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_make_targets_that_are_named_exist(page: Path) -> None:
    code = [*spans(page), *(line for block in blocks(page) for line in block.splitlines())]
    named = [path for text in code for path in re.findall(r"\b(?:common|resnet_\w+|tests|benchmarks)/[\w./]+", text)]
    for path in named:
        for family in architectures.families():
            assert (ROOT / path.replace("/F.py", f"/{family}.py")).exists(), path
    for text in code:
        assert set(re.findall(r"^make ([\w-]+)", text)) <= make_targets(), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_shown_parse(page: Path) -> None:
    for name, *arguments in commands(page):
        command = COMMANDS[name]
        if "…" in arguments:
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in arguments if word.startswith("-")} <= options
            continue
        given = command.make_context(name, arguments).params
        for variant in [given.get("variant"), *(given.get("variants") or ())]:
            assert variant is None or architectures.find(variant)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_are_named_exist(page: Path) -> None:
    options = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
    of_pytest = {"--full-trace", *OPTIONS}
    named = [span.split()[0] for span in spans(page) if span.startswith("--")]
    assert set(named) <= options | of_pytest
    shown = [word for block in blocks(page, "yaml") for word in block.split() if word.startswith("--parity")]
    assert set(shown) <= of_pytest


def test_the_examples_in_the_help_parse() -> None:
    for name, command in COMMANDS.items():
        shown = [line for line in command.epilog.splitlines() if line.startswith("resnet-parity ")]
        assert shown
        for line in shown:
            words = shlex.split(line)
            assert words[1] == name
            command.make_context(name, words[2:])


def test_the_help_shows_all_that_it_says() -> None:
    """What stands in brackets is taken for markup, and not shown."""
    for command in COMMANDS.values():
        assert "[" not in command.help + "".join(parameter.help or "" for parameter in command.params)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_names_and_keywords_of_the_python_examples_exist(page: Path) -> None:
    """Every call of something imported takes the arguments that it is given; nothing is run."""
    known: dict[str, Any] = {}
    for node in ast.walk(ast.parse("\n".join(blocks(page, "python")))):
        if isinstance(node, ast.Import):
            known |= {alias.name: import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = import_module(node.module)
            known |= {alias.name: getattr(module, alias.name) for alias in node.names}
    called = 0
    for node in ast.walk(ast.parse("\n".join(blocks(page, "python")))):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attribute)) if name in known:
                function = getattr(known[name], attribute)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="parity"), attr=attribute)):
                function = partial(getattr(Parity, attribute), None)
            case ast.Call(func=ast.Name(id=name)) if name in known:
                function = known[name]
            case _:
                continue
        inspect.signature(function).bind(*node.args, **{word.arg: word for word in node.keywords if word.arg})
        called += 1
    assert called


@pytest.mark.slow
def test_the_examples_of_one_network_in_all_three_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "models.md", "python"):
        if "vgg" in block:
            continue  # three times half a gigabyte, for what test_names_and_keywords shows nearly as well
        if "trained" in block:
            space["trained"] = space["resnet_torch"].from_spec(space["spec"])
            space["model"] = space["resnet_keras"].from_spec(space["spec"])
        exec(compile(block, "docs/models.md", "exec"), space)
    assert set(space["variables"]) == {"params", "batch_stats"}
