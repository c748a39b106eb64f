"""Measures of the project's English: sentence length, and turns of phrase that a native writer would not use.

`python -m tests.house.prose` prints them; `-v` lists every place.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

CALQUES = {
    "that of": r"\b(?:that|those) of\b",
    "of its own": r"\bof (?:its|their|our|his|my|your) own\b",
    "so many": r"\bso many\b",
    "beside": r"\bbeside\b",
    "whoever": r"\bwhoever\b",
    "what": r"\bwhat\b(?![^.!?]*\?)",
}
"""Phrases to avoid; `what` is allowed in a question."""

MESSAGE_WORDS = 5
"""String literals with at least this many words are messages or help texts."""

Place = tuple[str, int, str]
"""File, line and text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Counts of one body of text."""

    words: int
    sentences: int
    median: float
    """Words per sentence."""
    calques: tuple[str, ...]
    """Every calque with its place."""

    @property
    def calques_per_thousand(self) -> float:
        """Calques per 1,000 words."""
        return 1000 * len(self.calques) / max(1, self.words)


def measure(places: Iterator[Place]) -> Measure:
    """Count words, sentences and calques."""
    words, lengths, calques = 0, [], []
    for path, line, text in places:
        text = re.sub(r"`[^`]*`", "X", text)
        words += len(text.split())
        lengths += [len(sentence.split()) for sentence in sentences(text)]
        for name, pattern in CALQUES.items():
            for match in re.finditer(pattern, text, re.IGNORECASE):
                around = " ".join(text[max(0, match.start() - 30) : match.end() + 30].split())
                calques.append(f"{path}:{line}: {name}: … {around} …")
    return Measure(
        words=words, sentences=len(lengths), median=statistics.median(lengths or [0]), calques=tuple(calques)
    )


def sentences(text: str) -> list[str]:
    """Split a text into sentences; a list item and an argument's description are separate paragraphs."""
    paragraphs = re.split(
        r"\n\s*\n|\n\s*[-*]\s+|\n\s*\d+\.\s+|(?:^|\n)\s*\w+: |(?:^|\n)\s*(?:Args|Raises|Returns|Source):", text
    )
    parts = [part for paragraph in paragraphs for part in re.split(r"(?<=[.!?])[\s)]+(?=[A-Z`“(])", paragraph.strip())]
    return [part for part in parts if len(part.split()) > 1]


def prose_of_markdown(path: Path) -> Iterator[Place]:
    """Read the paragraphs of a page: no code, table, heading or generated block."""
    text = path.read_text()
    text = re.sub(r"```.*?```|<!--.*?-->|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    kept = [line for line in text.split("\n") if not re.match(r"\s*(\||#|=|---|    \S)", line)]
    yield str(path.relative_to(ROOT)), 1, "\n".join(kept)


def prose_of_code(path: Path) -> Iterator[Place]:
    """Read docstrings, comments and messages of a module."""
    source, name = path.read_text(), str(path.relative_to(ROOT))
    tree = ast.parse(source)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            text = node.value
        else:
            continue
        if len(text.split()) >= MESSAGE_WORDS or id(node) in alone:
            yield name, node.lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield name, token.start[0], token.string.lstrip("# ")


def pages() -> list[Path]:
    """List the pages that people read."""
    generated = {ROOT / "docs/cli.md"}
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")]
    return sorted(set(found) - generated)


def modules(*folders: str) -> list[Path]:
    """List the Python files of some folders; links are not followed."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


BODIES = {
    "pages": lambda: (place for path in pages() for place in prose_of_markdown(path)),
    "product": lambda: (
        place for path in modules("src", "runtime", "compiler", "analyzer") for place in prose_of_code(path)
    ),
    "tests and benchmarks": lambda: (place for path in modules("tests", "benchmarks") for place in prose_of_code(path)),
}
"""Bodies of text by name."""

if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if not word.startswith("-")]
    for body, places in BODIES.items():
        found = measure(place for place in places() if not chosen or any(own in place[0] for own in chosen))
        print(
            f"{body}: {found.words} words, {found.sentences} sentences, median {found.median:g} words, "
            f"{len(found.calques)} calques, {found.calques_per_thousand:.2f} per 1,000 words"
        )
        if "-v" in sys.argv:
            print(*found.calques, sep="\n")
