"""The rules that every file of algos/ keeps."""

import ast
import contextlib
import io
import re
import shlex
import sys

import pytest
import tyro
from helpers import NAMES, ROOT, TABULAR, TRAINED, header, module, requirements, tags_in, tags_on_page

every_file = pytest.mark.parametrize("name", NAMES)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BANNER = "# ── Plumbing"
IMPORT_NAMES = {"pillow": "PIL"}
SECTIONS = ["Quick facts", "The idea", "Equations", "Usage", "Logged metrics", "Details that matter"]
SECTIONS += ["Differences from the paper and its code", "Results"]


def source(name):
    return (ROOT / "algos" / f"{name}.py").read_text()


@every_file
def test_the_header_asks_for_what_requirements_do(name):
    block, ours = header(ROOT / "algos" / f"{name}.py"), requirements()
    assert block["requires-python"] == ">=3.11"
    assert set(block["dependencies"]) <= set(ours.values())
    packages = {re.match(r"[\w-]+", line)[0] for line in block["dependencies"]}
    needed = {"pygame-ce", "tensorboard"} | ({"mujoco", "imageio"} & packages)  # by Gymnasium and torch
    names = {IMPORT_NAMES.get(package, package.replace("-", "_")) for package in packages - needed}
    nodes = [node for node in ast.parse(source(name)).body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in nodes}
    assert imported - set(sys.stdlib_module_names) == names


@every_file
def test_one_order(name):
    marks = ["# /// script", '\n"""', "\nclass Args", "\nPRESETS = {", "\n# ── The algorithm", "\ndef train("]
    marks += ["\n# ── The task", f"\n{BANNER}", '\nif __name__ == "__main__":']
    places = [source(name).find(mark) for mark in marks]
    assert places[0] == 0 and places == sorted(places)
    assert len(ast.get_docstring(ast.parse(source(name))).splitlines()) <= 40


@every_file
def test_the_numbered_steps_are_in_train(name):
    steps = re.findall(r"^ {4}\(([\da-f])\) ", ast.get_docstring(ast.parse(source(name))), re.M)
    train = source(name).split("\ndef train(")[1].split("\n# ── ")[0]
    comments = "".join(line for line in train.splitlines() if line.strip().startswith("#"))
    assert steps and re.findall(r"\(([\da-f])\)", comments) == steps


@every_file
def test_every_setting_has_its_line_and_its_help(name):
    body = source(name).split("\nclass Args")[1].split("\n\n")[0].splitlines()[1:]
    assert body and all(re.match(r"    \w+: .+ = .+  # .{8,}", line) for line in body)
    assert len(body) <= (50 if "dreamer" in name or "muzero" in name else 40)


@pytest.mark.parametrize("names", [TRAINED, TABULAR], ids=["trained", "tabular"])
def test_the_plumbing_is_the_same_in_every_file(names):
    found = {}
    for name in names:
        for node in ast.parse(source(name)[source(name).index(BANNER) :]).body:
            key = getattr(node, "name", None) or ast.unparse(node)
            first, body = found.setdefault(key, (name, ast.dump(node)))
            assert body == ast.dump(node), f"{key} differs between {first} and {name}"
    assert len(found) > 7


@every_file
def test_the_file_has_its_page_tests_and_row(name):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert re.findall(r"^## (.*)", page, re.M) == SECTIONS
    assert (ROOT / "tests" / f"test_{name}.py").is_file()
    assert f"](algos/{name}.py)" in (ROOT / "README.md").read_text()
    assert f"]({name}.md)" in (ROOT / "docs" / "index.md").read_text()
    written = re.sub(r"<!-- report: .*?<!-- end of report -->", "", page, flags=re.DOTALL)
    assert sum(re.search(r"\w", word) is not None for word in written.split()) <= 1_200


@every_file
def test_page_and_file_name_the_same_tags(name):
    """Tags that the file assembles hold a *; those of the plumbing are written out."""
    written, explained = tags_in(ROOT / "algos" / f"{name}.py"), tags_on_page(name)
    assert all(any(re.fullmatch(tag.replace("*", r"\w+"), other) for other in explained) for tag in written)
    assert all(any(re.fullmatch(tag.replace("*", r"\w+"), other) for tag in written) for other in explained)


def test_every_command_parses():
    texts = [page.read_text() for page in PAGES] + [ast.get_docstring(ast.parse(source(name))) for name in NAMES]
    commands = {
        (name, flags.strip())
        for text in texts
        for name, flags in re.findall(r"python algos/(\w+)\.py((?: [^\s`#|&;)]+)*)", text)
        if name in NAMES
    }
    assert len(commands) > 10
    for name, flags in commands:
        words = shlex.split(flags)
        if {"--resume", "--evaluate"} & {*words}:
            words = [word for word in words if word not in ("--resume", "--evaluate") and not word.startswith("runs/")]
        presets = module(name).PRESETS
        words = words if words and words[0] in presets else [next(iter(presets)), *words]
        with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
            try:
                tyro.extras.overridable_config_cli(presets, args=words)
            except SystemExit as exit:
                assert not exit.code, f"{name} {flags}: {error.getvalue()}"


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert link.startswith(("http:", "https:")) or (page.parent / link).exists(), f"{page.name}: {link}"
