"""The pages: what they link to and name exists, their commands parse, and the lesson's exercises find their lines."""
import re
import shlex
from pathlib import Path

import pytest
from exercises import EXERCISES, change

import cascade

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "LESSON.md", "weights/README.md", "tests/README.md")]
PAGES += sorted((ROOT / "tests" / "porting").glob("*.md"))


def anchors(page):
    """The ids that GitHub gives to a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target
    text = re.sub(r"https?://\S+", "", text)
    for name in set(re.findall(r"(?<![\w./-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|svg)\b", text)):
        folders = (ROOT, page.parent) if "/" in name else (ROOT, *ROOT.glob("tests/**/"), *ROOT.glob("weights/**/"))
        assert any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page):
    text = page.read_text("utf-8").replace("\\\n", " ")
    for command in re.findall(r"(?:python3?|torchrun[^\n`]*?) cascade\.py\b([^\n`&|>]*)", text):
        arguments = shlex.split(command, comments=True)
        if "--help" not in arguments:
            cascade.parse(arguments)


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_changes_one_line_that_is_there(number):
    file, old, new = EXERCISES[number]
    changed = change((ROOT / file).read_text("utf-8"), old, new, file)
    compile(changed, file, "exec")


def test_the_recipe_for_weighted_words_runs():
    text = (ROOT / "weights" / "README.md").read_text("utf-8")
    scope = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    assert scope["hidden"].shape == (2, 2 * 32, 128) and scope["image"].size == (128, 128)
