#!/usr/bin/env python3
"""Tests tools/check_layers.py itself: each rule must fire on a small tree that breaks it, and stay silent on one that does not."""
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools/check_layers.py"
LAYERS = """
isobath_add_module(core SOURCES a.cpp DEPENDS LINK x)
isobath_add_module(comm SOURCES a.cpp DEPENDS core LINK MPI::MPI_CXX)
isobath_add_module(data SOURCES a.cpp HEADERS a.hpp DEPENDS comm)
isobath_add_module(quant SOURCES a.cpp DEPENDS core)
"""


class CheckLayersTest(unittest.TestCase):
    def run_on(self, files, layers=LAYERS):
        with tempfile.TemporaryDirectory() as folder:
            for name, text in {"src/CMakeLists.txt": layers, **files}.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            result = subprocess.run([sys.executable, TOOL, "--root", folder], capture_output=True, text=True)
            return result.returncode, result.stdout

    def assert_violation(self, files, expected, layers=LAYERS):
        code, output = self.run_on(files, layers)
        self.assertEqual(code, 1, output)
        self.assertIn(expected, output)

    def test_direct_and_transitive_dependencies_are_allowed(self):
        code, output = self.run_on({"src/data/a.cpp": "#include <isobath/comm/a.hpp>\n#include <isobath/core/a.hpp>\n"})
        self.assertEqual(code, 0, output)

    def test_an_include_against_the_arrows_is_found_in_sources_and_headers(self):
        self.assert_violation({"src/quant/a.cpp": "#include <isobath/comm/a.hpp>\n"}, "src/quant/a.cpp:1: quant may not")
        self.assert_violation({"include/isobath/core/a.hpp": "\n#include <isobath/data/a.hpp>\n"}, "core/a.hpp:2: core may")

    def test_a_folder_without_a_module_is_found(self):
        self.assert_violation({"src/utils/a.cpp": ""}, "the folder utils has no isobath_add_module")

    def test_a_cycle_and_an_unknown_module_are_found(self):
        cycle = "isobath_add_module(a DEPENDS b)\nisobath_add_module(b DEPENDS a)\n"
        self.assert_violation({}, "a depends on itself", cycle)
        self.assert_violation({}, "depends on zz", "isobath_add_module(a DEPENDS zz)\n")

    def test_each_habit_is_enforced_outside_its_home(self):
        for line in ("f(MPI_COMM_WORLD);", "std::cout << 1;", "#include <mpi.h>", "#include <torch/torch.h>"):
            self.assert_violation({"src/quant/a.cpp": line}, "src/quant/a.cpp:1")
        code, output = self.run_on({"src/comm/runtime.cpp": "#include <mpi.h>\nf(MPI_COMM_WORLD);\n",
                                    "src/quant/a.cpp": "// never MPI_COMM_WORLD\n"})
        self.assertEqual(code, 0, output)

    def test_a_long_file_needs_a_decision(self):
        long_file = {"src/quant/a.cpp": "\n" * 401}
        self.assert_violation(long_file, "401 lines")
        code, output = self.run_on({**long_file, "docs/decisions/0009-x.md": "src/quant/a.cpp is a table"})
        self.assertEqual(code, 0, output)


if __name__ == "__main__":
    unittest.main()
