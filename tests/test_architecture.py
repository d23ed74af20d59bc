"""The pages on the architecture and on its words tell what the code is."""

import ast
import re
from pathlib import Path

import pytest

import lmc_curvature

PACKAGE = Path(lmc_curvature.__file__).parent
DOCS = PACKAGE.parent / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")


def _definitions(path):
    """Qualified name to the source of every function and class in a file; aliases and constants, too."""
    source = path.read_text(encoding="utf-8")
    found = {}

    def visit(nodes, prefix):
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + node.name] = ast.get_source_segment(source, node)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update({prefix + target.id: "" for target in targets if isinstance(target, ast.Name)})

    visit(ast.parse(source).body, "")
    return found


def _rooms():
    return {
        str(init.parent.relative_to(PACKAGE)): ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
        for init in sorted(PACKAGE.glob("*/**/__init__.py"))
    }


def _path_lines():
    section = ARCHITECTURE.split("## One predicted number")[1]
    return re.findall(r"^( {4,})([\w.]+) +(\S+\.py)$", section, re.MULTILINE)


def test_every_room_is_on_the_page_with_its_sentence():
    section = ARCHITECTURE.split("## Rooms")[1].split("## One predicted number")[0]
    shown = re.findall(r"^ +([a-z_/]+)/ +(\S.*)$", section, re.MULTILINE)
    assert dict(shown) == _rooms()


def test_rooms_say_what_they_are_in_one_sentence_and_name_what_they_offer():
    for room, sentence in _rooms().items():
        assert sentence is not None, room
        assert sentence.endswith("."), room
        assert "\n" not in sentence, room


@pytest.mark.check
def test_the_path_names_functions_that_exist():
    lines = _path_lines()
    assert len(lines) > 20
    for _, name, file in lines:
        assert name in _definitions(PACKAGE / file), f"{file} has no {name}"


def test_every_step_of_the_path_is_called_where_the_page_says():
    above = []
    for indent, name, file in _path_lines():
        depth = len(indent)
        above = [entry for entry in above if entry[0] < depth]
        if above:
            _, parent, parent_file = above[-1]
            called = re.escape(name.rpartition(".")[2] if name[0].isupper() and "." in name else name)
            # Private helpers of the caller's file count as the caller.
            source = (PACKAGE / parent_file).read_text(encoding="utf-8")
            assert re.search(rf"\b{called}\b", source), f"{parent} in {parent_file} does not call {name}"
        above.append((depth, name, file))


@pytest.mark.check
@pytest.mark.parametrize("page", ["words.md"])
def test_every_word_lives_where_the_page_says(page):
    rows = re.findall(
        r"^\| (.+?) \| .+ \| `([\w.]+)` in `([\w/.]+)` \|$", (DOCS / page).read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) > 30
    for word, name, place in rows:
        files = [PACKAGE / place] if place.endswith(".py") else sorted((PACKAGE / place).glob("*.py"))
        assert any(name in _definitions(file) for file in files), f"{word}: no {name} in {place}"


@pytest.mark.check
def test_names_are_nouns_and_verbs_of_the_field():
    # Participles that once were names, and words that had two meanings in a room.
    gone = {"captured", "bent", "bends", "wanted", "moving", "curved", "cuts", "hold", "Captures", "Captured", "Data"}
    for path in sorted(PACKAGE.glob("**/*.py")):
        names = {name.rpartition(".")[2] for name in _definitions(path)}
        assert not names & gone, path
