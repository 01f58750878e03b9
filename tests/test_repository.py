"""Rules for the repository as a whole: sizes, promises, no machine's paths. `make style` checks the rest."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

from tests.everything import SLICES, parts_of_tests
from trainer.life.folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("configs", "models", "trainer", "launch", "slurm", "muster", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
PROMISES = ROOT / "docs" / "promises.md"

# A path that exists on one machine only. Written so that this line does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root)/")


def listed_files() -> list[Path]:
    """Every file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def python_files() -> list[Path]:
    return [path for path in listed_files() if path.suffix == ".py"]


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports test files by name alone, so of two equal names it could read only the first."""
    names = Counter(path.name for path in python_files() if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_files_are_short() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in python_files()}
    assert len(lengths) > 10
    assert {path: n for path, n in lengths.items() if n > MAX_FILE_LINES} == {}


def long_functions(source: str, limit: int) -> list[tuple[str, int]]:
    """(name, lines) of every function longer than the limit. Its decorators and docstring count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            if lines > limit:
                found.append((node.name, lines))
    return found


def test_functions_are_short() -> None:
    files = [path for path in python_files() if path.relative_to(ROOT).parts[0] in PACKAGES]
    assert len(files) > 5
    found = {path.relative_to(ROOT): long_functions(path.read_text("utf-8"), MAX_FUNCTION_LINES) for path in files}
    assert {path: functions for path, functions in found.items() if functions} == {}


def test_long_function_is_found() -> None:
    source = "class A:\n    @staticmethod\n    def f():\n" + "        x = 1\n" * 3
    assert long_functions(source, 5) == []
    assert long_functions(source, 4) == [("f", 5)]


def machine_paths(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line)]


def test_no_machine_paths() -> None:
    found: dict[str, list[str]] = {}
    for path in listed_files():
        try:
            lines = machine_paths(path.read_text("utf-8"))
        except UnicodeDecodeError:
            continue  # a binary file
        if lines:
            found[str(path.relative_to(ROOT))] = lines
    assert found == {}


def test_machine_path_is_found() -> None:
    for folder in ("work", "root"):
        assert machine_paths(f"a\nsee /{folder}/x for it\n") == [f"see /{folder}/x for it"]
    assert machine_paths("frame/work/x\na network/\n~/root/x") == []


def test_models_hold_no_collectives() -> None:
    """import-linter does not see inside torch, so this test checks it."""
    for path in (ROOT / "models").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute):
                assert not re.search(
                    r"\btorch\.distributed\b|\bfrom torch import .*\bdistributed\b", ast.unparse(node)
                ), path


# ---- docs/promises.md: tables of promises, the tests or commands that show each, in backticks, and when these run


def promises(text: str) -> list[tuple[str, list[str], str]]:
    """(promise, proofs, tier) of every row of every table. A proof is `tests/x.py::test_y` or `make target`."""
    rows: list[tuple[str, list[str], str]] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        if re.fullmatch(r"[|\s:-]+", line):
            rows.pop()  # a ruler: the line above was the table's header
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        rows.append((cells[0], re.findall(r"`((?:tests/|make )[^`]+)`", cells[1]), "".join(cells[2:])))
    return rows


TIERS = ("make test", "make test-all", "make gpu", "by hand")


def tier_of(proof: str, root: Path) -> str:
    """The first tier that runs the proof."""
    if proof.startswith("make "):
        if proof == "make gpu":
            return "make gpu"
        lines = (root / "Makefile").read_text("utf-8").replace("\\\n", " ").splitlines()
        start = next(n for n, line in enumerate(lines) if re.match(rf"{proof.split()[1]}\b.*:(?!=)", line))
        return "make test-all" if "--full" in lines[start + 1] else "by hand"
    name, _, test = proof.partition("::")
    if "gpu" in Path(name).parts:
        return "make gpu"
    if not test:
        return "make test"
    source = (root / name).read_text("utf-8")
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == test.split("[")[0]]
    whole = re.search(r"^pytestmark = .*mark\.full\b", source, re.M)
    marks = [ast.unparse(mark) for node in found for mark in node.decorator_list]
    return "make test-all" if whole or "pytest.mark.full" in marks else "make test"


def missing_proof(proof: str, root: Path) -> str | None:
    """What is wrong with a proof, or None if it exists."""
    if proof.startswith("make "):
        target = proof.split()[1]
        lines = (root / "Makefile").read_text("utf-8").splitlines()
        rules = [line.split(":")[0].split() for line in lines if re.match(r"[\w.-][^=\t]*:(?!=)", line)]
        return None if any(target in rule for rule in rules) else f"the Makefile has no target {target}"
    name, _, test = proof.partition("::")
    path = root / name
    if not path.exists():
        return f"there is no {name}"
    if not test:
        return None if path.is_dir() or path.name.startswith("test_") else f"{name} holds no tests"
    level: list[ast.stmt] = ast.parse(path.read_text("utf-8")).body
    for part in test.split("[")[0].split("::"):
        named = [n for n in level if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        match = next((n for n in named if n.name == part), None)
        if match is None:
            return f"{name} has no {part}"
        level = match.body
    return None


def test_promises_have_proofs() -> None:
    rows = promises(PROMISES.read_text("utf-8"))
    assert rows
    problems = [f"{promise}: names no test and no make target" for promise, proofs, _ in rows if not proofs]
    for promise, proofs, _ in rows:
        problems += [f"{promise}: {wrong}" for proof in proofs if (wrong := missing_proof(proof, ROOT))]
    assert not problems, "\n".join(problems)
    wrong_tiers = [
        f"{promise}: {first}, not {tier!r}"
        for promise, proofs, tier in rows
        if tier != (first := min((tier_of(proof, ROOT) for proof in proofs), key=TIERS.index))
    ]
    assert not wrong_tiers, "\n".join(wrong_tiers)


def test_promise_parser(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(".PHONY: test\nVENV := .venv\ntest: a\n\trun: x\nlife gpu:\n\trun\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("def test_x(): ...\nclass TestB:\n    def test_y(self): ...\n")
    text = """
| promise | shown by | tier |
|---|---|---|
| one | `tests/test_a.py::test_x`, `make life` | make test |
| two \\| half | by `tests/test_a.py::TestB::test_y[case]` | make test-all |
| three | nothing yet | |

| other | text | shown by |
| :-- | --- | --: |
| four | `make ignored` | by hand |
"""
    assert promises(text) == [
        ("one", ["tests/test_a.py::test_x", "make life"], "make test"),
        ("two \\| half", ["tests/test_a.py::TestB::test_y[case]"], "make test-all"),
        ("three", [], ""),
        ("four", ["make ignored"], "by hand"),
    ]
    good = [proof for _, proofs, _ in promises(text)[:3] for proof in proofs]
    assert [missing_proof(proof, tmp_path) for proof in [*good, "make gpu", "tests/test_a.py"]] == [None] * 5
    for bad in ("make run", "make VENV", "make .venv", "tests/test_b.py::test_x", "tests/test_a.py::test_y"):
        assert missing_proof(bad, tmp_path), bad
    assert missing_proof("tests/test_a.py::TestB::test_x", tmp_path)


def test_the_tier_of_a_proof(tmp_path: Path) -> None:
    makefile = "MORE := a\nbench: x\n\trun\nlife gone: x\n\t@run \\\n\t    --full\nlifetime:\n\trun\n"
    (tmp_path / "Makefile").write_text(makefile)
    source = "@pytest.mark.full\n@pytest.mark.x\ndef test_x(): ...\ndef test_y(): ...\n"
    (tmp_path / "test_a.py").write_text(source)
    (tmp_path / "test_b.py").write_text("pytestmark = pytest.mark.full\n" + source)
    expected = {"test_a.py::test_x": "make test-all", "test_a.py::test_y[1]": "make test", "test_a.py": "make test"}
    expected |= {
        "test_b.py::test_y": "make test-all",
        "make gpu": "make gpu",
        "tests/gpu/test_c.py::test_z": "make gpu",
    }
    expected |= {"make life": "make test-all", "make bench": "by hand", "make lifetime": "by hand"}
    assert {proof: tier_of(proof, tmp_path) for proof in expected} == expected


# ---- docs/architecture.md: its table of rooms names every file of the product ----------------------------------------


def modules_named(text: str) -> set[str]:
    """Paths of the .py files in the table of rooms. A bare name is in the folder of the row's first name."""
    table = text.split("| room | holds |")[1].split("\n\n")[0]
    found = set()
    for row in table.splitlines():
        names = re.findall(r"`([\w/]*\w\.py|\w[\w/]*/)`", row)
        folder = names[0].rpartition("/")[0] if names else ""
        found |= {name if "/" in name else f"{folder}/{name}" for name in names if name.endswith(".py")}
    return found


def test_the_table_of_rooms_names_every_module_and_no_other() -> None:
    files = {path.relative_to(ROOT) for path in python_files()}
    product = {path for path in files if path.parts[0] in PACKAGES and path.parts[0] != "benchmarks"}
    wanted = {str(path) for path in product if path.name not in ("__init__.py", "__main__.py")}
    named = modules_named((ROOT / "docs" / "architecture.md").read_text("utf-8"))
    assert len(wanted) > 100
    assert wanted - named == set()
    assert named - {str(path) for path in files} == set()  # the table may name a test, too


def test_modules_are_read_from_a_table_of_rooms() -> None:
    table = "| room | holds |\n|---|---|\n| `a/b.py`, `c.py` | see `d.py` and `e/f.py` |\n| `g/` | `h.py` |\n\n`i.py`"
    assert modules_named(table) == {"a/b.py", "a/c.py", "a/d.py", "e/f.py", "g/h.py"}


# ---- docs/life.md: its table of files by which processes meet --------------------------------------------------------


def test_every_file_of_a_run_folder_is_in_the_table_of_files() -> None:
    folder = RunFolder(Path("run"))
    paths = {name: getattr(folder, name) for name, kind in vars(RunFolder).items() if isinstance(kind, property)}
    table = (
        (ROOT / "docs" / "life.md").read_text("utf-8").split("## Files by which processes meet")[1].split("\n## ")[0]
    )
    names = re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `")))
    assert len(paths) > 10
    missing = [path for path in paths.values() if not any(Path("run", name).is_relative_to(path) for name in names)]
    assert missing == []


# ---- what runs when --------------------------------------------------------------------------------------------------


def test_test_all_runs_every_file_of_tests() -> None:
    files = {str(path.relative_to(ROOT)) for path in python_files() if path.name.startswith("test_")}
    found: dict[str, list[str]] = {}
    for name in parts_of_tests():
        file, _, piece = name.partition(" ")
        found.setdefault(file, []).append(piece)
    assert {name for name in files if not name.startswith("tests/gpu/")} == found.keys()
    for file, pieces in found.items():
        count = SLICES.get(file)
        assert pieces == ([f"{n}/{count}" for n in range(1, count + 1)] if count else [""])


# ---- one test for both engines --------------------------------------------------------------------------------------


def engine_specific(source: str) -> list[str]:
    """Tests with the fixture `engine` that treat one engine differently: they skip, or ask which engine it is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        arguments = {a.arg for a in node.args.args} if isinstance(node, ast.FunctionDef) else set()
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and "engine" in arguments:
            for inner in ast.walk(node):
                skips = isinstance(inner, ast.Attribute) and inner.attr in {"skip", "skipif", "xfail", "importorskip"}
                looks = isinstance(inner, ast.If | ast.IfExp | ast.Compare) and "engine" in ast.unparse(inner)
                if skips or looks:
                    found.append(f"{node.name}: {ast.unparse(inner).splitlines()[0]}")
    return found


def test_tests_of_both_engines_are_the_same() -> None:
    tests = [path for path in python_files() if path.relative_to(ROOT).parts[0] == "tests"]
    sources = {path: path.read_text("utf-8") for path in tests if path.name.startswith("test_")}
    assert sum("engine: dict[str, Any]" in source for source in sources.values()) >= 3
    assert {path: wrong for path, source in sources.items() if (wrong := engine_specific(source))} == {}
    for path, source in sources.items():
        assert not re.search(r"(skip|xfail)\w*\([^)]*(zero|fsdp|deep" + "speed)", source, re.IGNORECASE), path


def test_an_engine_specific_skip_is_found() -> None:
    head = "def test_x(engine, tmp_path):\n"
    assert engine_specific(head + "    train(tiny(tmp_path, **engine))\n") == []
    assert engine_specific(head + "    pytest.skip('not there')\n")
    assert engine_specific(head + "    if engine:\n        return\n")
    assert engine_specific("@pytest.mark.skipif(True)\n" + head + "    pass\n")
