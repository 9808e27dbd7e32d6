"""Long-context training with sparsely-sharded attention. Importing this costs milliseconds and lets transformers, once
that is imported, open our models (`s2.integrations.lazy`)."""

from .integrations.lazy import install as _install

_install()
