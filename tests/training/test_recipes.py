"""Every recipe in the repository parses, builds its model's config, and chains onto the stage before it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.section import DataSection
from s2.model.config import ModelConfig
from s2.model.hf import load_config, load_pretrained
from s2.model.transformer import Transformer
from s2.recipe import load_recipe
from s2.settings import read
from s2.training.config import read_stage
from s2.training.module import _missing_checkpoint, resolve_config
from s2.training.stage import Stage
from s2.training.strategy import ZeROStrategy
from s2.training.weights import sink_warning

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
WORLD_SIZES = {"demo": (1,), "1.3b": (8, 16, 32, 64), "7b": (16, 32, 64), "llama3.1-8b": (16, 32, 64)}
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CHECKPOINTS = {  # config.json of what recipes start from and the repository does not have
    "models/smollm2-135m": LLAMA | {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 1e5,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    },
    "models/llama-3.1-8b": LLAMA | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 5e5,
        "rope_scaling": LLAMA3, "bos_token_id": 128000, "eos_token_id": 128001,
    },
}  # fmt: skip


def build(path: Path, folder: Path) -> Stage:
    """The recipe as the command line builds it, after writing the config.json its `init_from` needs into
    `folder`."""
    recipe = load_recipe(path)
    init_from = recipe["model"].get("init_from")
    if init_from and (ROOT / init_from).is_dir():  # a checkpoint of the repository itself
        shutil.copytree(ROOT / init_from, folder / init_from, dirs_exist_ok=True)
    elif init_from in CHECKPOINTS:
        (folder / init_from).mkdir(parents=True, exist_ok=True)
        (folder / init_from / "config.json").write_text(json.dumps(CHECKPOINTS[init_from]))
    elif init_from:
        previous = load_recipe(path.parent / f"{Path(init_from).parent.name}.yaml")
        before = previous["model"].get("init_from")
        if before:
            build(path.parent / f"{Path(init_from).parent.name}.yaml", folder)
        config = resolve_config(previous["model"]["config"], before)
        target = folder / init_from / "config.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(config.to_hf_dict()))
    return Stage(read_stage(recipe, path))


def test_the_recipes_are_there() -> None:
    names = {str(path.relative_to(ROOT / "recipes")) for path in RECIPES}
    assert names >= {
        "demo/pretrain.yaml", "demo/extend-2k.yaml", "1.3b/pretrain.yaml", "1.3b/extend-32k.yaml",
        "7b/pretrain.yaml", "7b/extend-32k.yaml", "7b/extend-128k.yaml", "smollm2/extend-8k.yaml",
        "smollm2/extend-32k.yaml", "llama3.1-8b/extend-8k.yaml", "llama3.1-8b/extend-32k.yaml",
        "llama3.1-8b/extend-128k.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # on the one rank of this process a step is one of many micro-batches, which the recipes' numbers all allow
    stage = build(path, tmp_path)
    run, trainer, module, data = stage.run, stage.trainer, stage.module, stage.data
    assert (run.recipe, run.stage) == (path.parent.name, path.stem)
    assert isinstance(trainer.strategy, ZeROStrategy)
    assert module.config.max_position_embeddings >= data.seq_len
    for world_size in WORLD_SIZES.get(path.parent.name, (8,)):
        steps = run.accumulation(data.micro_batch_size, data.seq_len, world_size)
        assert steps is not None and steps * data.micro_batch_size * data.seq_len * world_size == run.tokens_per_step
    with torch.device("meta"):
        model = Transformer(module.config)
    assert sum(p.numel() for p in model.parameters()) == module.config.num_parameters()
    report = stage.report()
    assert module.config.attention_layout in report and "memory estimate" in report


EXTENSIONS = [path for path in RECIPES if path.stem.startswith("extend")]


@pytest.mark.parametrize("path", EXTENSIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_extension_raises_length_and_theta_and_keeps_short_documents(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = build(path, tmp_path)
    init_from = Path(stage.module.init_from)
    before, config = load_config(tmp_path / init_from), stage.module.config
    if config.max_position_embeddings > before.max_position_embeddings:
        assert config.rope_theta > before.rope_theta
    else:  # a checkpoint that is converted, or reaches as far as it is
        assert (config.rope_theta, config.rope_scaling) == (before.rope_theta, before.rope_scaling)
        assert str(init_from) in CHECKPOINTS or path.parent.name == "llama3.1-8b"
    previous = path.parent / f"{init_from.parent.name}.yaml"
    trained = load_recipe(previous)["data"]["init_args"]["seq_len"] if previous.is_file() else stage.data.seq_len
    assert stage.data.seq_len > trained or str(init_from) in CHECKPOINTS or path.parent.name == "demo"
    components = stage.data.components
    total = sum(c.weight for c in components)
    long = sum(c.weight for c in components if c.min_tokens >= min(trained, before.max_position_embeddings))
    assert 0.5 <= round(long / total, 9) <= 0.7
    assert {"long", "short"} <= set(stage.data.validation_names)


@pytest.mark.parametrize("path", EXTENSIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_retrieval_documents_are_an_option_of_every_extension(path: Path) -> None:
    if path.parent.name == "demo":
        return  # it is made of them
    values = load_recipe(path)["data"]["init_args"]
    assert values["retrieval"]["share"] == 0
    off, on = (read(DataSection, values | {"retrieval": values["retrieval"] | {"share": x}}, "data") for x in (0, 0.1))
    assert on.components[:-1] == off.components and on.specs[:-1] == off.specs
    share = on.components[-1].weight / sum(component.weight for component in on.components)
    assert share == pytest.approx(0.1) and on.heldout_sets[-1].name == "retrieval"
    # enough for a tenth of the stage, and as long as its windows
    [source] = on.specs[-1].sources
    tokens = load_recipe(path)["trainer"]["max_steps"] * load_recipe(path)["run"]["tokens_per_step"]
    assert 0.9 < source.retrieval.documents * source.retrieval.mean_chars / 4 / (0.1 * tokens) < 2
    assert source.retrieval.tokens[1] == on.seq_len
    first = Path(values["mixture"][-1]["path"])
    assert (Path(source.retrieval.filler), first.name) == (first, "train")


@pytest.mark.parametrize("folder", CHECKPOINTS)
def test_layouts_of_converted_checkpoints_keep_the_first_block(folder: str) -> None:
    """And their stages run at a small size of the same shape: every layer, head, block and kind of RoPE."""
    recipes = [load_recipe(path) for path in EXTENSIONS]
    [model] = [recipe["model"] for recipe in recipes if recipe["model"]["init_from"] == folder]
    base = ModelConfig.from_hf_dict(CHECKPOINTS[folder])
    small = {"vocab_size": 128, "hidden_size": 8 * base.num_attention_heads, "head_dim": 8, "intermediate_size": 32}
    source = base.replace(**small, bos_token_id=None, eos_token_id=None)
    config = source.replace(**model["config"] | {"block_size": 16})
    assert sink_warning(source, config, {}, {}) == ""
    torch.manual_seed(0)
    network = Transformer(source)
    network.attend_as(config)
    ids = torch.randint(128, (1, 400))
    loss, count = network(ids, labels=ids)
    (loss / count).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_every_stage_of_1_3b_and_7b_covers_the_whole_context_within_one_layer() -> None:
    for path in RECIPES:
        config = load_recipe(path)["model"]["config"]
        if "attention_layout" in config and path.parent.name in ("1.3b", "7b"):
            model = resolve_config(config, None)
            assert all(pattern.layers_to_cover(model.num_key_value_heads) == 1 for pattern in model.layout.patterns)


def test_the_demo_extends_a_checkpoint_that_its_own_recipe_makes() -> None:
    """Shapes, layout and tokenizer: the same recipe with more tokens gives another one to put in its place."""
    recipe = load_recipe(ROOT / "recipes/demo/pretrain.yaml")
    folder = ROOT / load_recipe(ROOT / "recipes/demo/extend-2k.yaml")["model"]["init_from"]
    start, model = load_config(folder), resolve_config(recipe["model"]["config"], None)
    assert replace(start, bos_token_id=None, eos_token_id=None) == model
    for section in recipe["data"]["init_args"]["prepare"]:
        assert ROOT / section["tokenizer"]["path"] == folder / "tokenizer.json"
    assert sum(p.numel() for p in load_pretrained(folder).parameters()) == model.num_parameters()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 << 20


def test_a_missing_checkpoint_of_another_model_is_said_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("smollm2", "llama3.1-8b"):
        recipe = load_recipe(Path(f"recipes/{name}/extend-8k.yaml"))
        folder = recipe["model"]["init_from"]
        assert re.search(f"; get it with `hf download .* --local-dir {folder}[ `]", _missing_checkpoint(folder))
    assert _missing_checkpoint("elsewhere").endswith("; point model.init_from at a Hugging Face folder")
