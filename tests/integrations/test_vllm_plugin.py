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


def test_another_plugin_may_have_the_place_for_backends():
    pytest.importorskip("vllm.v1.core.kv_cache_manager", reason="needs vLLM 0.24")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    plugin.register()
    assert not AttentionBackendEnum.CUSTOM.is_overridden()
    register_backend(AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
    try:
        plugin.register()
        assert AttentionBackendEnum.CUSTOM.get_path() == "another.plugin.Backend"
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()
