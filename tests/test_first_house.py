"""The house rules hold, and each of them bites."""

import shutil
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    assert rule(ROOT) == []


def swap(path, old, new):
    """The break: `old` becomes `new` in one file of the scratch copy (it must be there)."""

    def break_it(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text, f"{old!r} is not in {path}: this break breaks nothing"
        (root / path).write_text(text.replace(old, new, 1))

    return break_it


def second_script(old, new):
    """A second script, muzero.py with one change."""

    def break_it(root: Path) -> None:
        shutil.copy(root / "algos" / "muzero.py", root / "algos" / "another.py")
        swap("algos/another.py", old, new)(root)

    return break_it


def remove(path):
    return lambda root: (root / path).unlink()


A, PAGE = "algos/muzero.py", "docs/muzero.md"
BREAKS = [
    (house.imports_are_declared, swap(A, "import shlex\n", "import shlex\nfrom pets import plan\n")),
    (house.imports_are_declared, swap(A, "import shlex\n", "import shlex\nfrom . import pets\n")),
    (house.imports_are_declared, swap(A, "import shlex\n", "import shlex\nfrom dm_control import suite\n")),
    (house.imports_are_declared, swap(A, '#     "tyro>=1.0,<2",\n', "")),
    (house.imports_are_declared, swap(A, '#     "tyro>=1.0,<2",\n', '#     "tyro>=1.0,<2",\n#     "numba",\n')),
    (house.imports_are_declared, swap(A, "import shlex\n", "import importlib\nimportlib.import_module('pets')\n")),
    (house.header_matches_requirements, swap("requirements.txt", "pytest>=8", "scipy>=1\npytest>=8")),
    (house.header_matches_requirements, swap(A, '#     "numpy>=2.0,<3",', '#     "numpy>=1.0,<3",')),
    (house.header_matches_requirements, swap("requirements.txt", "tqdm>=4.66,<5", "tqdm>=4.60,<5")),
    (house.same_name_same_body, second_script("float(reward), length + 1", "float(reward), length + 2")),
    (house.args_are_documented, swap(A, '    """γ: discount. For a game of two players its sign is turned."""\n', "")),
    (house.args_are_documented, swap(A, '"""γ: discount. For a game of two players its sign is turned."""', '""""""')),
    (house.args_are_documented, swap(A, "    capture_video: bool", "    film: bool")),
    (house.order_of_a_file, swap(A, "# ── Plumbing", "# ── Other things")),
    (house.order_of_a_file, swap(A, "# /// script", "import abc\n# /// script")),
    (house.steps_are_in_train, swap(A, "                # (4) draw", "                # draw")),
    (house.steps_are_in_train, swap(A, "                # (4) draw", "                # (6) draw")),
    (house.steps_are_in_train, swap(A, "    (4) draw", "    (7) draw")),
    (house.tags_are_explained, swap(A, '"losses/norm"', '"losses/another"')),
    (house.tags_are_explained, swap(PAGE, "| `losses/norm` |", "| `losses/norms` |")),
    (house.commands_parse, swap(PAGE, "python algos/muzero.py", "python algos/muzero.py --alpah 0.1")),
    (house.commands_parse, swap(PAGE, "python algos/muzero.py", "python algos/muzero9.py")),
    (house.commands_parse, swap("README.md", "`diff algos/mpc_rs.py", "`diff algos/mpc.py")),
    (house.commands_parse, swap(PAGE, "muzero_figures.py tictactoe", "muzero_figures.py chequers")),
    (house.links_lead_somewhere, remove(PAGE)),
    (house.links_lead_somewhere, remove("docs/figures/muzero_track.png")),
    (house.every_file_has_its_page, swap(PAGE, "## Key equations", "## Some equations")),
    (house.every_file_has_its_page, second_script("MuZero", "MuOne")),
    (house.every_file_has_its_page, swap("README.md", "| [`muzero`]", "| `dreamer` | planned |\n| [`muzero`]")),
]


@pytest.mark.parametrize(("rule", "break_it"), BREAKS, ids=lambda x: getattr(x, "__name__", ""))
def test_rule_bites(rule, break_it, tmp_path):
    for name in ("algos", "docs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    assert rule(tmp_path) == []
    break_it(tmp_path)
    assert rule(tmp_path) != []


def test_every_rule_is_broken_once():
    assert {rule for rule, _ in BREAKS} == set(house.RULES)
