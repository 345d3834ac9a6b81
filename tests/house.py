"""The rules of the first edition as functions of a checkout: each returns the sentences of what is broken.

tests/test_first_house.py runs them on the files that are not moved yet, and on scratch copies that break each rule.
"""

import ast
import contextlib
import functools
import importlib.util
import io
import itertools
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import tyro

# Definitions that say what an algorithm is, and so differ between files by design. All others of one name are copies.
OWN = {"Args", "train", "check_settings", "load_policy", "make_task"}
# What a package is imported as, where that is not its name.
IMPORT_NAMES = {"pillow": "PIL", "pygame-ce": "pygame", "ale-py": "ale_py", "opencv-python-headless": "cv2"}
# Needed without an import of their own: torch writes events with tensorboard, Gymnasium draws with pygame.
NOT_IMPORTED = {"tensorboard", "pygame-ce", "mujoco", "ale-py", "glfw", "imageio", "opencv-python-headless"}
# Not among the requirements: a preset says that it needs them, and they are imported where they are used, inside.
OPTIONAL = {"dm_control"}
SHARED_FLAGS = {
    "env_id", "seed", "device", "compile", "total_timesteps", "eval_every", "eval_episodes", "run_dir",
    "checkpoint_every", "resume", "evaluate", "episodes", "capture_video", "progress",
    "log_every", "eval_max_steps", "picture_every",
}  # fmt: skip
DOCS_SECTIONS = [
    "Quick facts", "The idea", "Key equations", "Usage", "Logged metrics", "Details that matter",
    "Our settings against", "Results",
]  # fmt: skip
TAG = re.compile(r"(?:charts|eval|losses|model|time)/[\w*]+")
COMMAND = re.compile(r"(?:python3?|uv run) ((?:algos|benchmarks)/[\w.]+)((?: [^\s`#|&;)]+)*)")


# Files of the second edition, which tests/test_house.py holds to its rules; the others wait for theirs.
LEAN = {"dyna_q", "pets", "mpc_rs", "pddm", "mbpo", "mage", "vin", "icm", "dreamer_v1", "dreamer_v2"}


def scripts(root: Path) -> list[Path]:
    return sorted(path for path in (root / "algos").glob("*.py") if path.stem not in LEAN)


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


parsed = functools.cache(ast.parse)  # of a text: the scratch copies hold the same ones again and again


def tree(path: Path) -> ast.Module:
    return parsed(path.read_text())


def definitions(path: Path) -> dict[str, ast.AST]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in tree(path).body if isinstance(node, kinds)}


def load(path: Path):
    """The script as a module of its own; twice the same file, twice a module."""
    name = f"{path.stem}_{abs(hash(path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def header(path: Path) -> dict:
    """The PEP 723 block."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())
    return tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.M)) if block else {}


def requirements(root: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines()]
    return {re.match(r"[\w-]+", line)[0]: line for line in lines if line}


# ── The rules ─────────────────────────────────────────────────────────────────────────────────────────────────────


def imports_are_declared(root: Path) -> list[str]:
    """A script imports the standard library and what its header names; nothing of this repository."""
    wrong = []
    for path in scripts(root):
        packages = {re.match(r"[\w-]+", line)[0] for line in header(path).get("dependencies", [])}
        declared = {IMPORT_NAMES.get(name, name) for name in packages}
        imported = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("." if node.level else node.module.split(".")[0])
            elif isinstance(node, ast.Name) and node.id in ("__import__", "importlib", "exec", "runpy"):
                imported.add(f"by {node.id} what no reader sees")
        nodes = [node for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        at_once = {(getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in nodes}
        for name in sorted(imported - declared - set(sys.stdlib_module_names) - (OPTIONAL - at_once)):
            wrong.append(f"{path.name} imports {name}, which its header does not name")
        for name in sorted(packages - NOT_IMPORTED):
            if IMPORT_NAMES.get(name, name) not in imported:
                wrong.append(f"{path.name} names {name} in its header and does not import it")
    return wrong


def header_matches_requirements(root: Path) -> list[str]:
    wrong, ours = [], requirements(root)
    for path in scripts(root):
        block = header(path)
        if block.get("requires-python") != ">=3.11":
            wrong.append(f"{path.name}: its header must require Python >=3.11")
        for line in block.get("dependencies", []):
            if line not in ours.values():
                wrong.append(f"{path.name} asks for {line}, requirements.txt does not")
    asked = {line for path in scripts(root) for line in header(path).get("dependencies", [])}
    for name, line in ours.items():
        if line not in asked and name not in ("pytest", "pytest-xdist", "hypothesis"):
            wrong.append(f"requirements.txt asks for {line}, no script does")
    return wrong


def same_name_same_body(root: Path) -> list[str]:
    wrong, seen = [], {}
    for path in scripts(root):
        for name, node in definitions(path).items():
            first, body = seen.setdefault(name, (path.name, ast.dump(node)))
            if name not in OWN and body != ast.dump(node):
                wrong.append(f"{name} differs between {first} and {path.name}")
    return wrong


def args_are_documented(root: Path) -> list[str]:
    wrong = []
    for path in scripts(root):
        body = definitions(path)["Args"].body
        fields = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
        documented = {
            field.target.id
            for field, doc in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and ast.literal_eval(doc.value).strip()
        }
        wrong += [f"{path.name}: Args.{name} has no docstring" for name in fields if name not in documented]
        wrong += [f"{path.name}: Args lacks {name}" for name in sorted(SHARED_FLAGS - set(fields))]
    return wrong


def order_of_a_file(root: Path) -> list[str]:
    """Header, docstring, Args, PRESETS, the algorithm with train, the plumbing's banner, main."""
    wrong = []
    marks = ["# /// script", '\n"""', "\nimport ", "\nclass Args", "\nPRESETS = {", "\ndef train(", "\n# ── Plumbing",
             '\nif __name__ == "__main__":']  # fmt: skip
    for path in scripts(root):
        places = [path.read_text().find(mark) for mark in marks]
        for mark, place in zip(marks, places, strict=True):
            if place < 0:
                wrong.append(f"{path.name} has no {mark.strip()!r}")
        if places != sorted(places) or places[0] != 0:
            wrong.append(f"{path.name} is not in the order of the house")
    return wrong


def steps_are_in_train(root: Path) -> list[str]:
    """Each numbered step of the docstring stands as a comment with its number in train."""
    wrong = []
    for path in scripts(root):
        steps = re.findall(r"^ {4}\((\d+)\) ", ast.get_docstring(tree(path)) or "", flags=re.M)
        if not steps:
            wrong.append(f"{path.name}: no numbered steps in the docstring")
        source = ast.get_source_segment(path.read_text(), definitions(path)["train"])
        in_train = re.findall(r"^ *# \((\d+)\) ", source, flags=re.M)
        if steps != in_train:
            wrong.append(f"{path.name}: steps {steps} in the docstring, {in_train} in train")
    return wrong


def tags_in(path: Path) -> set[str]:
    """The TensorBoard tags a script can write; what an f-string fills in is a *."""
    nodes = list(ast.walk(tree(path)))
    strings = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in strings for part in node.values}
    tags = {"".join(x.value if isinstance(x, ast.Constant) else "*" for x in node.values) for node in strings}
    tags |= {x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str) and id(x) not in parts}
    return {tag for tag in tags if TAG.fullmatch(tag)}


def tags_on(page: Path) -> set[str]:
    """The tags that a docs page explains: the first cell of each row of its table of metrics."""
    section = page.read_text().split("## Logged metrics")[-1].split("\n## ")[0] if page.is_file() else ""
    cells = re.findall(r"^\|([^|]+)\|", section, flags=re.M)
    return {tag for cell in cells for tag in re.findall(r"`([^`]+)`", cell) if TAG.fullmatch(tag)}


def tags_are_explained(root: Path) -> list[str]:
    wrong = []
    for path in scripts(root):
        written, explained = tags_in(path), tags_on(root / "docs" / f"{path.stem}.md")
        for tag in sorted(written):
            if not any(re.fullmatch(tag.replace("*", r"\w+"), other) for other in explained):
                wrong.append(f"{path.name} logs {tag}, its page does not explain it")
        for tag in sorted(explained):
            if not any(re.fullmatch(other.replace("*", r"\w+"), tag) for other in written):
                wrong.append(f"docs/{path.stem}.md explains {tag}, the script does not log it")
    return wrong


def commands_parse(root: Path) -> list[str]:
    """Every command in README, docs and docstrings names a script that is there and flags that it takes."""
    wrong = []
    sources = [*pages(root), *scripts(root), *sorted((root / "benchmarks").glob("*.py"))]
    found = [(path.name, *match) for path in sources for match in COMMAND.findall(path.read_text())]
    if not found:
        return ["no command is shown anywhere"]
    for where, script, flags in found:
        if not (root / script).is_file():
            wrong.append(f"{where} shows {script}, which is not there")
            continue
        if Path(script).stem in LEAN:
            continue
        known = (script, (root / script).read_text(), flags)
        if known not in PARSES:
            PARSES[known] = parses(load(root / script), shlex.split(flags))
        if not PARSES[known]:
            wrong.append(f"{where} shows a command that does not parse: {script}{flags}")
    for path in pages(root):
        for name in " ".join(re.findall(r"`diff (\S+ \S+)`", path.read_text())).split():
            if not (root / name).is_file():
                wrong.append(f"{path.name} compares {name}, which is not there")
    return wrong


PARSES: dict[tuple, bool] = {}  # script, its text, flags → whether they go together


def parses(module: ModuleType, argv: list[str]) -> bool:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            if hasattr(module, "PRESETS"):
                module.command_line(argv, module.PRESETS)
            elif hasattr(module, "Args"):
                tyro.cli(module.Args, args=argv)
            else:
                return not argv
        except SystemExit as error:
            return not error.code  # --help leaves with 0
    return True


def links_lead_somewhere(root: Path) -> list[str]:
    return [
        f"{page.name} links to {link}, which is not there"
        for page in pages(root)
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if not link.startswith(("http:", "https:")) and not (page.parent / link).exists()
    ]


def every_file_has_its_page(root: Path) -> list[str]:
    """A docs page with all its sections, tests, a row in README; and no row with a result for a file not there."""
    wrong = []
    readme = (root / "README.md").read_text()
    for path in scripts(root):
        page = root / "docs" / f"{path.stem}.md"
        text = page.read_text() if page.is_file() else ""
        headings = re.findall(r"^## (.*)", text, flags=re.M)
        for section in DOCS_SECTIONS:
            if not any(heading.startswith(section) for heading in headings):
                wrong.append(f"docs/{path.stem}.md has no section {section!r}")
        if not (root / "tests" / f"test_{path.stem}.py").is_file():
            wrong.append(f"tests/test_{path.stem}.py is not there")
        if f"](algos/{path.name})" not in readme:
            wrong.append(f"README.md has no row for {path.name}")
        if f"]({page.name})" not in (root / "docs" / "index.md").read_text():
            wrong.append(f"docs/index.md does not name {page.name}")
    for name in re.findall(r"^\| `(\w+)` \|", readme, flags=re.M):  # a row without a link
        wrong.append(f"README.md has a row for {name}, which is not there")
    return wrong


RULES = [
    imports_are_declared,
    header_matches_requirements,
    same_name_same_body,
    args_are_documented,
    order_of_a_file,
    steps_are_in_train,
    tags_are_explained,
    commands_parse,
    links_lead_somewhere,
    every_file_has_its_page,
]
