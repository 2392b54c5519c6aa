"""Every module can be imported, and typing `minift` does not wait for torch. Oracle: a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "minift").rglob("*.py"))
        if path.name != "__main__.py"  # runs the command line when imported
    ]
    failures = run(f"""
import importlib, traceback
for name in {names!r}:
    try:
        importlib.import_module(name)
    except BaseException:
        print(name, traceback.format_exc())
""")
    assert not failures, failures


def test_help_and_recipe_mistakes_do_not_wait_for_torch():
    heavy = "torch", "matplotlib", "transformers", "numpy"
    loaded = run(f"import sys, minift.cli; print([name for name in {heavy!r} if name in sys.modules])")
    assert loaded.strip() == "[]"
