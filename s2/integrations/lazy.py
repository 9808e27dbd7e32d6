"""What `import s2` does for transformers: it waits for it.

Nothing of transformers is imported, neither here nor when transformers itself is. As soon as one of four of its
modules has run, a name of ours is registered there, by its public `register` (types of cache layers have none), and
stands for what `hf` has. That is imported when the name is used: a folder of type `s2_llama` is read, or a layer
attends by "s2".
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TYPE, _ATTENTION, _CACHE_LAYER = "s2_llama", "s2", "s2_sparse_attention"


def _modeling() -> Any:
    import_module("s2.integrations.hf")  # registers the real ones
    return import_module("s2.integrations.modeling_s2_llama")


class _Deferred(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_modeling().S2LlamaConfig, name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _modeling().S2LlamaConfig(*args, **kwargs)


class S2LlamaConfig(metaclass=_Deferred):
    """Stands for the real one until somebody uses it."""

    model_type = _TYPE


def _attend(*args: Any, **kwargs: Any) -> Any:
    return _modeling().attention_forward(*args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    return _modeling().batch_mask(*args, **kwargs)


def _cache_layer(**kwargs: Any) -> Any:
    return import_module("s2.integrations.kept_layer").KeptLayer(**kwargs)


def _take_layer(module: Any) -> None:
    module.DYNAMIC_LAYER_TYPE_MAPPING.setdefault(_CACHE_LAYER, _cache_layer)


_STEPS: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": lambda module: module.AutoConfig.register(_TYPE, S2LlamaConfig),
    "transformers.cache_utils": _take_layer,
    "transformers.modeling_utils": lambda module: module.AttentionInterface.register(_ATTENTION, _attend),
    "transformers.masking_utils": lambda module: module.AttentionMaskInterface.register(_ATTENTION, _mask),
}


def _take(name: str, module: ModuleType) -> None:
    """Whatever may be wrong with this, transformers itself still works."""
    try:
        _STEPS[name](module)
    except Exception as error:
        warnings.warn(f"{name} does not take {_TYPE!r} ({error!r}); try another version of transformers", stacklevel=2)


class _Loader:
    """Another's, with a step behind it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _take(module.__name__, module)


class _Finder:
    """Finds nothing itself; puts a step behind what others find."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _STEPS:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


def install() -> None:
    """Registers with what of transformers is there already, and waits for the rest. Once a process."""
    for name in _STEPS:
        if name in sys.modules:
            _take(name, sys.modules[name])
    sys.meta_path.insert(0, _Finder())
