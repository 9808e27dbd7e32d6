"""Other libraries' doors to this one. Importing this package imports none of them."""

from pathlib import Path

HF_MODELING = Path(__file__).with_name("modeling_s2_llama.py")
HF_FILES = (HF_MODELING, HF_MODELING.with_name("plain_s2_llama.py"))  # go into every exported folder with sparse layers
