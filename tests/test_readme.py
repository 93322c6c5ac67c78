"""What the README says of the code: its example, its index of equations; and the width of lines."""
import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

from support.run import read_rows

README = (ROOT / "README.md").read_text()

ALONE = """
import json
import sys

folder, allowed = sys.argv[1], set(json.loads(sys.argv[2])) | set(sys.stdlib_module_names)


finders = list(sys.meta_path)


class Allowed:
    # in the place of all finders: finds what is allowed, so that the rest is as if not installed
    @staticmethod
    def find_spec(name, path=None, target=None):
        own = name.startswith("_sysconfigdata")     # Python's, named after the machine
        if name.partition(".")[0] not in allowed and not own:
            return None
        specs = (finder.find_spec(name, path, target) for finder in finders)
        return next((spec for spec in specs if spec), None)


sys.meta_path[:] = [Allowed]
sys.path.insert(0, folder)
for name in ("safetensors", "transformers", "common", "model"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")
exec(open(f"{folder}/example.py").read())
"""


def packages_of(distribution):
    """Return the names of the distributions that one needs, itself included."""
    found, left = set(), [distribution]
    while left:
        name = re.match(r"[\w.-]+", left.pop()).group().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        left += [line for line in required if "extra ==" not in line]
    return found


def test_the_example_needs_two_files_and_torch_alone(tmp_path):
    """sample.py and grpo.py in a folder of their own, where nothing else can be imported."""
    section = re.search(r"\n#+ [^\n]*your own[^\n]*\n(.*)", README, re.S | re.I).group(1)
    code, text = re.search(r"```python\n(.*?)```(.*)", section, re.S).groups()
    promised = re.search(r"prints\s+`(reward \S+ -> \S+)`", text).group(1)
    for name in ("sample.py", "grpo.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "example.py").write_text(code)

    needed = packages_of("torch")
    allowed = [module for module, owners in importlib.metadata.packages_distributions().items()
               if needed & {owner.lower().replace("_", "-") for owner in owners}]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, tmp_path, json.dumps([*allowed, "sample", "grpo"])],
        capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == promised


@pytest.mark.parametrize("file, wanted", [
    ("sample", {"math", "collections", "dataclasses", "torch"}), ("grpo", {"torch"})])
def test_what_is_pasted_needs_torch_alone(file, wanted):
    tree = ast.parse((ROOT / f"{file}.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == wanted


def numbers(text):
    """Return the numbers of the equations that a text names: "Eq. 1-3 and 5" names four."""
    found, part = set(), r"\d+(?:-\d+)?"
    for group in re.findall(rf"Eq\. ({part}(?:(?:, | and ){part})*)", text):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", group):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def test_how_equations_are_named():
    assert numbers("Eq. 1-3 and 5, but 8 is none; Eq. 10, 12") == {1, 2, 3, 5, 10, 12}


ROWS = re.findall(r"^\| *(Eq\. [^|]*?) *\| *`?([^|]*?)`? *\|", README, re.M)


def test_the_index_names_every_equation_that_is_computed():
    named = set().union(*(numbers(equations) for equations, _ in ROWS))
    assert named >= {1, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15}


@pytest.mark.parametrize("equations, places", ROWS)
def test_the_index_of_equations_is_true(equations, places):
    """The function or class is there, and names the equations in its source."""
    for place in places.replace("`", "").split(", "):
        file, name = place.split(":")
        source = (ROOT / file).read_text()
        node, lines = ast.parse(source), source.splitlines()
        for part in name.removesuffix("()").split("."):     # Class.method too
            node, = (child for child in node.body if getattr(child, "name", None) == part)
        own = "\n".join(lines[node.lineno - 1:node.end_lineno])
        missing = numbers(equations) - numbers(own)
        assert not missing, f"{place} does not name {sorted(missing)}"


def test_the_core_is_as_long_as_said():
    said = int(re.search(r"method\s+is\s+about\s+(\d+)\s+lines", README)[1])
    mdp, _ = (ROOT / "sample.py").read_text().split("-- pictures\n")
    source = (ROOT / "train.py").read_text()
    loop = [node for node in ast.parse(source).body
            if getattr(node, "name", None) in ("main", "update")]
    found = (mdp.count("\n") + (ROOT / "grpo.py").read_text().count("\n")
             + sum(node.end_lineno - node.lineno + 1 for node in loop))
    assert len(loop) == 2 and abs(found - said) < 0.1 * said, found


PAGE = (ROOT / "results/first_command.md").read_text()


def test_the_tables_of_results_hold_what_was_measured():
    """The base's and the last evaluation of the first command's runs, whose mean is over 0.8: the
    overall score in the README, all families on the page."""
    columns = ("overall", "single_object", "two_object", "counting", "colors", "position",
               "color_attr")
    scores = dict(re.findall(r"^\| (?:after, |before )(seed \d+|training) \| ([\d.]+) \|$",
                             README, re.M))
    families = dict(re.findall(r"^\| (base|seed \d+) \| (.*) \|$", PAGE.split("\n## ")[0], re.M))
    ends = []
    for seed in (42, 43, 44):
        rows = read_rows(ROOT / f"results/shapes-p2-seed{seed}.jsonl")
        for name, label, row in (("training", "base", rows[0]),
                                 (f"seed {seed}", f"seed {seed}", rows[-1])):
            assert float(scores[name]) == round(row["overall"], 3)
            assert [float(cell) for cell in families[label].split(" | ")] == [
                round(row[column], 3 if column == "overall" else 2) for column in columns]
        ends.append(rows[-1]["overall"])
    assert len(scores) == 4 == len(families) and sum(ends) / 3 > 0.8


def test_relations_are_those_that_were_measured():
    """A row for each policy: right, reversed; of position, of two colours."""
    for label, name in (("base", "world"), ("after training", "world-seed42")):
        found = json.loads((ROOT / f"results/{name}.json").read_text())["relations"]
        assert f"| {label} | " + " | ".join(
            f"{found[tag][key]:.2f}" for tag in ("position", "color_attr")
            for key in ("asked", "opposite")) + " |" in PAGE


def test_the_glossary_names_what_is_in_the_code():
    """Every name of the last column is one in the files that implement the method."""
    rows = re.search(r"\| paper \| where .*?\n(?!\|)", README, re.S)[0].splitlines()[2:]
    code = {node.id if isinstance(node, ast.Name) else getattr(node, "attr", None) or
            getattr(node, "arg", None) or getattr(node, "name", None)
            for file in ("sample", "grpo", "train")
            for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text()))}
    named = [name for row in rows for text in re.findall("`([a-z][^`]*)`", row.split("|")[3])
             for name in re.findall(r"[a-z]\w+", text)]
    assert len(rows) >= 8 and len(named) >= 15 and set(named) <= code


def test_the_tree_names_what_is_there():
    tree = re.search(r"```\n(sample\.py .*?)```", README, re.S)[1]
    named = set(re.findall(r"^(\S+)  ", tree, re.M))
    there = {path.name + "/" * path.is_dir() for path in ROOT.iterdir()}
    folders = {"support/", "shapes/", "prompts/", "tools/", "results/", "tests/"}
    assert {path.name for path in ROOT.glob("*.py")} | folders <= named <= there


def test_lines_have_at_most_100_columns():
    ours = [path for path in ROOT.rglob("*.py")
            if not {"runs", "build", "site-packages"} & set(path.relative_to(ROOT).parts)
            and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    assert len(ours) > 15
    wide = [f"{path.relative_to(ROOT)}:{number}" for path in ours
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not wide
