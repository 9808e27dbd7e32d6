"""Every recipe in the repository parses, builds its model's config, and chains onto the stage before it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s2.model.hf import load_config, load_pretrained
from s2.model.transformer import Transformer
from s2.recipe import load_recipe
from s2.training.config import read_stage
from s2.training.module import resolve_config
from s2.training.stage import Stage
from s2.training.strategy import ZeROStrategy

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
WORLD_SIZES = {"demo": (1,), "1.3b": (8, 16, 32, 64), "7b": (16, 32, 64)}


def build(path: Path, folder: Path) -> Stage:
    """The recipe as the command line builds it, after writing the config.json its `init_from` needs into
    `folder`."""
    recipe = load_recipe(path)
    init_from = recipe["model"].get("init_from")
    if init_from and (ROOT / init_from).is_dir():  # a checkpoint of the repository itself
        shutil.copytree(ROOT / init_from, folder / init_from, dirs_exist_ok=True)
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
        "7b/pretrain.yaml", "7b/extend-32k.yaml", "7b/extend-128k.yaml",
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


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("extend")], ids=lambda p: str(p.parent.name))
def test_an_extension_raises_length_and_theta_and_keeps_short_documents(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = build(path, tmp_path)
    init_from = Path(stage.module.init_from)
    before = json.loads((tmp_path / init_from / "config.json").read_text())
    assert stage.module.config.max_position_embeddings > before["max_position_embeddings"]
    assert stage.module.config.rope_theta > before["rope_theta"]
    components = stage.data.components
    total = sum(c.weight for c in components)
    long = sum(c.weight for c in components if c.min_tokens >= before["max_position_embeddings"])
    assert 0.5 <= round(long / total, 9) <= 0.7
    assert {"long", "short"} <= set(stage.data.validation_names)


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
