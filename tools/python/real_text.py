#!/usr/bin/env python3
"""Gathers real English text from the documentation of installed wheels: NumPy's and PyTorch's for the quick start.

The wheels are pinned, so the text is the same everywhere and nothing is downloaded for it. Paragraphs of prose are
taken from the documentation strings; code, tables and repeated paragraphs are left out. Whole source files go either
to calibration.txt or to test.txt, and no paragraph is in both.
"""
import argparse
import ast
import hashlib
import re
import sysconfig
from pathlib import Path

PACKAGES = ["numpy", "torch"]
MIN_STRING = 200  # characters; shorter constants are messages, not documentation
MIN_WORDS = 12
MIN_LETTERS = 0.9  # letters and blanks in a paragraph of prose
TEST_SHARE = 0.55  # of the source files
MARKUP = [
    (re.compile(r":[a-z:]+:`~?([^`<]+)(?: <[^`]*>)?`"), r"\1"),  # :func:`~torch.add`
    (re.compile(r"`+([^`]+)`+_*"), r"\1"),
    (re.compile(r"\*+([^*\s][^*]*)\*+"), r"\1"),
]


def paragraphs(text):
    """Prose paragraphs of a documentation string, each on one line, markup removed."""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        for pattern, replacement in MARKUP:
            line = pattern.sub(replacement, line)
        if ">>>" in line or not line[:1].isupper() or line[-1:] not in ".:" or len(line.split()) < MIN_WORDS:
            continue
        if sum(c.isalpha() or c == " " for c in line) >= MIN_LETTERS * len(line):
            yield line


def strings(path):
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    constants = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    for node in sorted(constants, key=lambda n: (n.lineno, n.col_offset)):
        if len(node.value) >= MIN_STRING:
            yield node.value


def gather(site_packages, packages):
    texts = {"calibration": [], "test": []}
    seen = set()
    for package in packages:
        files = sorted((site_packages / package).rglob("*.py"), key=lambda p: p.as_posix())
        if not files:
            raise SystemExit(f"real_text.py: no {package} in {site_packages}; run launch/setup.sh")
        for path in files:
            name = path.relative_to(site_packages).as_posix()
            if re.search(r"/(tests?|testing|_vendor|_inductor)/", name):
                continue
            fresh = []
            for text in strings(path):
                for paragraph in paragraphs(text):
                    key = re.sub(r"[^a-z]+", " ", paragraph.lower())
                    if key not in seen:
                        seen.add(key)
                        fresh.append(paragraph)
            share = hashlib.sha256(name.encode()).digest()[0] / 256
            texts["test" if share < TEST_SHARE else "calibration"] += fresh
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/quickstart"), help="folder for the two files")
    parser.add_argument("--site-packages", type=Path, default=Path(sysconfig.get_path("purelib")))
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help="installed packages to read, in this order")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, lines in gather(arguments.site_packages, arguments.packages).items():
        path = arguments.output / f"{name}.txt"
        text = "\n\n".join(lines) + "\n"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(path)
        print(f"{path}: {len(lines)} paragraphs, {len(text)} characters")


if __name__ == "__main__":
    main()
