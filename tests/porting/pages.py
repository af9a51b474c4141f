"""Tables of the porter's pages, and the sections of these pages that scripts write."""
from pathlib import Path

PORTING = Path(__file__).resolve().parent
OPERATORS_PAGE = PORTING / "OPERATORS.md"
PORTING_PAGE = PORTING / "PORTING.md"
PERFORMANCE_PAGE = PORTING / "PERFORMANCE.md"


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def with_section(page, name, text):
    """The page with new text between the two markers of a section."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def write_section(path, name, text):
    path.write_text(with_section(path.read_text("utf-8"), name, text), encoding="utf-8")
