"""The door by which vLLM comes in."""

import subprocess
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_entry_point_names_a_function_and_costs_no_import_of_vllm():
    points = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["entry-points"]
    module, name = points["vllm.general_plugins"]["s2"].split(":")
    code = f"import sys, {module} as plugin; assert callable(plugin.{name}); assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
