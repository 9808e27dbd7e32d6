"""Records name versions, also of packages that lie on the path without metadata."""

import importlib
import importlib.metadata
import sys

import pytest

from s2.training import environment
from s2.versions import version_of


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Puts a module on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(module, text):
        path = tmp_path.joinpath(*module.split("."), "__init__.py")
        path.parent.mkdir(parents=True)
        path.write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.startswith("lost")]:
        del sys.modules[name]


def test_metadata_come_first(monkeypatch):
    monkeypatch.setattr(pytest, "__version__", "of the module")
    assert version_of("pytest") == importlib.metadata.version("pytest")


@pytest.mark.parametrize(
    ("package", "module"), [("lost_one", "lost_one"), ("lost-two", "lost_two"), ("lost-three", "lost.three")]
)
def test_without_metadata_the_module_says_its_version(put, package, module):
    put(module, "__version__ = '1.2.3'")
    assert version_of(package) == "1.2.3"


@pytest.mark.parametrize("text", ["", "raise OSError('libcudart.so.9')"])
def test_a_module_that_does_not_say_or_import_has_none(put, text):
    put("lost_four", text)
    assert version_of("lost_four") is None and version_of("lost_five") is None


def test_a_run_records_them_too(put, monkeypatch):
    put("lost_six", "__version__ = '5'")
    monkeypatch.setattr(environment, "_PACKAGES", ("lost_six", "lost_seven"))
    found = environment.environment()["versions"]
    assert found["lost_six"] == "5" and "lost_seven" not in found
