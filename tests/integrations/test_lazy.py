"""`import s2` and transformers in either order, and folders of ours where the package is not."""

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, dynamic_module_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from s2.inference import generate
from s2.integrations import HF_FILES, lazy, modeling_s2_llama
from s2.model import ModelConfig, Transformer
from s2.model.hf import save_pretrained

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "s2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def run(code, *arguments, options=(), folder=ROOT, **environment):
    """What a process says."""
    command = [sys.executable, *options, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def export(tmp_path):
    config = ModelConfig(
        vocab_size=61, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, attention_layout="L1V3+sink1+dense1", block_size=16,
        initializer_range=0.1, qk_norm=True, tie_word_embeddings=True,
        rope_scaling={"dense": {"rope_type": "linear", "factor": 2.0}, "sparse": None},
    )  # fmt: skip
    model = Transformer(config).eval()
    save_pretrained(model, config, tmp_path / "hf", dtype=torch.float32)
    return model, tmp_path


# ---------------------------------------------------------------- import s2


def test_importing_s2_imports_neither_torch_nor_transformers():
    run("import s2, sys; assert not {'torch', 'transformers', 's2.integrations.hf'} & sys.modules.keys()")


def test_a_step_is_taken_behind_a_module_that_is_imported_later_and_at_once_for_one_that_is_there(
    tmp_path, monkeypatch
):
    taken = []
    for name in ("s2_test_later", "s2_test_there"):
        (tmp_path / f"{name}.py").write_text("value = 1\n")
        monkeypatch.setitem(lazy._STEPS, name, lambda module: taken.append((module.__name__, module.value)))
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(lazy, "_STEPS", {name: lazy._STEPS[name] for name in ("s2_test_later", "s2_test_there")})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [x for x in sys.meta_path if not isinstance(x, lazy._Finder)])
    importlib.import_module("s2_test_there")
    lazy.install()
    assert taken == [("s2_test_there", 1)]
    later = importlib.import_module("s2_test_later")
    assert taken[1:] == [("s2_test_later", 1)]
    assert later.__loader__ is later.__spec__.loader and not isinstance(later.__loader__, lazy._Loader)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("s2_test_never")


def test_what_stands_for_the_config_is_the_config_to_whoever_uses_it(export):
    real = modeling_s2_llama.S2LlamaConfig
    assert type(lazy.S2LlamaConfig(attention_layout="W2")) is real
    assert type(lazy.S2LlamaConfig.from_dict({"attention_layout": "W2"})) is real
    assert type(lazy.S2LlamaConfig.from_pretrained(export[1] / "hf")) is real
    assert lazy.S2LlamaConfig.model_type == real.model_type and not hasattr(lazy.S2LlamaConfig, "__wrapped__")


def test_a_transformers_that_takes_nothing_of_ours_still_works():
    with pytest.warns(UserWarning, match="try another version of transformers"):
        lazy._take("transformers.modeling_utils", sys)


@pytest.mark.nightly
def test_transformers_loads_nothing_of_ours_before_it_is_used():
    run(
        """
        import s2, sys
        from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
        assert not [name for name in sys.modules if name.startswith(("s2.integrations.hf", "s2.integrations.modeling"))]
        assert type(AutoConfig.for_model("s2_llama", attention_layout="L2V4")).__module__.startswith("s2.integrations")
        """
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    "imports",
    ["import s2; import transformers", "import transformers; import s2", "import s2, transformers.modeling_utils",
     "from transformers import LlamaForCausalLM; import s2", "import s2.integrations.hf"],
)  # fmt: skip
def test_our_folder_opens_with_either_import_first(imports, export):
    code = """
        import sys, transformers
        from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        import torch
        small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        llama = LlamaForCausalLM(LlamaConfig(**small, attention_layout="W1", block_size=16, attn_implementation="s2"))
        assert llama(torch.zeros(1, 5, dtype=torch.long)).logits.shape == (1, 5, 9)
        assert AutoConfig.from_pretrained(sys.argv[1]).attention_layout
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        assert type(model).__module__ == "s2.integrations.modeling_s2_llama", type(model).__module__
    """
    run(f"{imports}\n{textwrap.dedent(code)}", export[1] / "hf")


# ---------------------------------------------------------------- without the package


def test_a_trusted_folder_brings_its_own_code(export, monkeypatch):
    """As where the package is not: nothing is registered, and it cannot be imported."""
    model, folder = export
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "s2_llama")
    monkeypatch.setitem(sys.modules, "s2.attention", None)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", {**interface._global_mapping})
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(folder / "hf", trust_remote_code=False)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True).eval()
    source = sys.modules[type(theirs).__module__]
    assert Path(source.__file__).is_relative_to(folder) and source.s2_attention is None
    ids = torch.randint(61, (2, 90))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=2e-5, rtol=1e-4)
        bare = AutoModel.from_pretrained(folder / "hf", trust_remote_code=True).eval()
        assert torch.equal(bare(ids).last_hidden_state, theirs.model(ids).last_hidden_state)
    theirs.save_pretrained(folder / "again")
    assert all((folder / "again" / file.name).is_file() for file in HF_FILES)


@pytest.mark.nightly
def test_without_the_package_a_trusted_folder_gives_our_logits_tokens_and_gradients(export):
    model, folder = export
    ids = torch.randint(61, (2, 90))
    save_file({"ids": ids}, folder / "in.safetensors")
    code = """
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained("hf")
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise AssertionError("it opened without being trusted")
        model = AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True).eval()
        assert not [name for name in sys.modules if name.partition(".")[0] == "s2"]
        ids = load_file("in.safetensors")["ids"]
        out = model(ids, labels=ids)
        out.loss.backward()
        found = {"logits": out.logits.detach(), "grad": model.model.embed_tokens.weight.grad}
        found["tokens"] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        save_file({name: x.contiguous() for name, x in found.items()}, "out.safetensors")
        model.save_pretrained("again")
        again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True).eval()
        torch.testing.assert_close(again(ids).logits, out.logits)
    """
    code, modules = BLOCKED + textwrap.dedent(code), str(folder / "modules")
    said = run(code, options=["-I"], folder=folder, HF_MODULES_CACHE=modules)
    assert "plain torch" in said
    found = load_file(folder / "out.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(ids), atol=2e-5, rtol=1e-4)
    assert torch.equal(found["tokens"][:, 90:], generate(model, ids, 30))
    total, count = model(ids, labels=torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100))
    (total / count).backward()
    torch.testing.assert_close(found["grad"], model.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-3)
