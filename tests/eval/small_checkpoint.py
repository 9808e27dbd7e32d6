"""Small checkpoints and texts for the evaluation tests: random weights, a tokenizer trained on the spot."""

import random
from pathlib import Path

import torch

from data.corpus.tokenizer import train_tokenizer
from s2.model.config import ModelConfig
from s2.model.hf import save_pretrained
from s2.model.transformer import Transformer

_WORDS = (  # noqa: SIM905
    "the a river boat evening bell wind leaf road stone house garden light water bird night morning "
    "window letter friend runs falls turns comes goes sings waits opens closes under over near behind old "
    "young small quiet 12 345 6789 magic number of is key pass "
).split()


def prose(sentences: int, seed: int = 0) -> str:
    """Sentences of random words, four to a line."""
    rng = random.Random(seed)
    made = (" ".join(rng.choices(_WORDS, k=rng.randint(5, 14))).capitalize() + "." for _ in range(sentences))
    return "".join(f"{sentence}{chr(10) if i % 4 == 3 else ' '}" for i, sentence in enumerate(made)).strip()


def make_checkpoint(
    folder: Path, layout: str = "L2V4-inter", max_length: int = 256, adds_bos: bool = True, layers: int = 2
) -> Path:
    """A Hugging Face folder of a random model whose tokenizer does or does not put BOS before a text."""
    folder.mkdir(parents=True)
    tokenizer_file = folder.parent / f"{folder.name}-tokenizer" / "tokenizer.json"
    tokenizer_file.parent.mkdir()
    train_tokenizer([prose(400)], 512, tokenizer_file)
    if not adds_bos:
        from tokenizers import Tokenizer, processors

        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.save(str(tokenizer_file))
    config = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=max_length,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        attention_layout=layout,
        block_size=16,
    )
    torch.manual_seed(0)
    save_pretrained(Transformer(config), config, folder, tokenizer_file, dtype=torch.float32)
    return folder


def mark_words(folder: Path) -> Path:
    """The folder with a tokenizer that marks words by the space before them, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|bos|>", "<|eos|>"], show_progress=False)
    tokenizer.train_from_iterator([prose(400)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
