#!/usr/bin/env python3
"""Checks the source text against the layer diagram and the habits of the project; prints every violation.

Layers: a file of include/isobath/<module> or src/<module> may include <isobath/x/…> only when x is the module itself or
is reached through the DEPENDS lists of src/CMakeLists.txt.
Habits: the RULES below, and no file above 400 lines without a line in docs/decisions/ that names it.
"""
import argparse
import re
import sys
from pathlib import Path

MAX_LINES = 400
SUFFIXES = {".hpp", ".cpp", ".cu", ".cuh"}
COMMENT = re.compile(r"//.*|/\*.*?\*/")

# what, pattern, files (path prefixes) that may, why
RULES = [
    ("MPI_COMM_WORLD", r"\bMPI_COMM_WORLD\b", ("src/comm/runtime.cpp", "tests/support/"),
     "pass a Communicator instead"),
    ("std::cout or std::cerr", r"\bstd::(cout|cerr)\b", ("src/core/log.cpp", "tests/", "bench/"), "print through isobath/core/log.hpp"),
    ("<mpi.h>", r"#\s*include\s*[<\"]mpi\.h[>\"]", ("src/comm/", "include/isobath/comm/", "tests/support/", "tests/comm/"),
     "only module comm knows MPI"),
    ("<nccl.h>", r"#\s*include\s*[<\"]nccl\.h[>\"]", ("src/comm/",), "only module comm knows NCCL"),
    ("torch/torch.h", r"#\s*include\s*[<\"]torch/torch\.h[>\"]", (), "it costs 43 s per file; include narrowly"),
]


def read_layers(cmake_lists):
    """module -> modules its DEPENDS names."""
    text = re.sub(r"#.*", "", cmake_lists.read_text(encoding="utf-8"))
    layers = {}
    for name, arguments in re.findall(r"isobath_add_module\(\s*(\w+)(.*?)\)", text, re.S):
        depends = re.search(r"\bDEPENDS\b(.*?)(?:\bLINK\b|\bSOURCES\b|\bHEADERS\b|$)", arguments, re.S)
        layers[name] = set(depends.group(1).split()) if depends else set()
    return layers


def reachable(layers, module):
    found, open_modules = {module}, [module]
    while open_modules:
        for dependency in layers.get(open_modules.pop(), ()):
            if dependency not in found:
                found.add(dependency)
                open_modules.append(dependency)
    return found


def source_files(root, folders):
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8").splitlines()


def check_diagram(layers):
    for module, dependencies in layers.items():
        for dependency in sorted(dependencies - layers.keys()):
            yield f"src/CMakeLists.txt: {module} depends on {dependency}, which is no module"
        if any(module in reachable(layers, dependency) for dependency in dependencies):
            yield f"src/CMakeLists.txt: {module} depends on itself"


def check_includes(root, layers):
    for name, lines in source_files(root, ["include/isobath", "src"]):
        module = name.removeprefix("include/isobath/").removeprefix("src/").split("/")[0]
        if module not in layers:
            yield f"{name}: the folder {module} has no isobath_add_module in src/CMakeLists.txt"
            continue
        allowed = reachable(layers, module)
        for number, line in enumerate(lines, 1):
            match = re.match(r"\s*#\s*include\s*[<\"]isobath/(\w+)/", line)
            if match and match.group(1) not in allowed:
                yield f"{name}:{number}: {module} may not include {match.group(1)} (allowed: {', '.join(sorted(allowed))})"


def check_habits(root):
    decisions = "\n".join(p.read_text(encoding="utf-8") for p in sorted((root / "docs/decisions").glob("*.md")))
    for name, lines in source_files(root, ["include", "src", "tests", "bench"]):
        if len(lines) > MAX_LINES and name not in decisions:
            yield f"{name}: {len(lines)} lines, more than {MAX_LINES}; split it or give the reason in docs/decisions/"
        for number, line in enumerate(lines, 1):
            code = COMMENT.sub("", line)
            for what, pattern, allowed, why in RULES:
                if re.search(pattern, code) and not name.startswith(allowed):
                    yield f"{name}:{number}: {what}: {why}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    arguments = parser.parse_args()
    layers = read_layers(arguments.root / "src/CMakeLists.txt")
    if not layers:
        sys.exit("check_layers.py: no isobath_add_module found in src/CMakeLists.txt")
    problems = [*check_diagram(layers), *check_includes(arguments.root, layers), *check_habits(arguments.root)]
    print("\n".join(problems) if problems else f"{len(layers)} modules, no violations")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
