"""What the documents show of the attention runs as it stands there, also without a GPU."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/attention.md"])
def test_the_first_python_of_a_page_runs(page):
    code = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL).group(1)
    names = {}
    exec(compile(code, page, "exec"), names)
    assert names["out"].shape == names["q"].shape
