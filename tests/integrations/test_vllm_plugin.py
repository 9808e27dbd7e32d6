"""The door by which vLLM comes in."""

import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from s2.integrations import vllm as plugin

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_entry_point_names_a_function_and_costs_no_import_of_vllm():
    points = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["entry-points"]
    module, name = points["vllm.general_plugins"]["s2"].split(":")
    code = f"import sys, {module} as plugin; assert callable(plugin.{name}); assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("version", ["0.33.0", "0.23.1", "dev"])
def test_another_vllm_is_left_as_it_is_with_a_warning(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))  # importing from it would fail
    with pytest.warns(UserWarning, match=f"vLLM {version} does not get the plugin"):
        plugin.register()
