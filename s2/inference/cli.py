"""Continue prompts with a checkpoint, to the terminal as the tokens come or as JSON lines.

    python -m s2.inference.cli --ckpt runs/demo/extend-2k/hf --prompt "def main(" --max-new-tokens 100 --stop "def "

Each `--prompt` and each `--prompt-file` (`-`: standard input) is one prompt; without any, standard input is. The text
of one prompt is streamed; of several, which go side by side in batches, it comes when they have ended. `--json` writes
a line for each prompt instead:

    text, reason         the continuation, and why it ended: "eos", "stop" or "length"
    tokens, token_ids    of the continuation, with the one that ended it
    prompt_tokens        BOS included
    seconds              from the beginning of its batch, prefill included, to the end of this prompt
    tokens_per_second    tokens / seconds

What is drawn at a temperature depends on the seed, and on the prompts of the batch and of those before it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2 import ending
from s2.arguments import DTYPES, new_parser, path

from .checks import check_sampling
from .encoding import TextEncoder
from .folder import ModelFolder, memory_for
from .pool import DecodePool
from .prefill import add_prefill_chunk
from .text import Piece, Reason, cache_size, stream_texts

_STDIN = Path("-")


@dataclass
class _Asked:
    """A prompt, and what has come of it.

    Attributes:
        name: the option that gave it, for error messages.
        seconds: from the beginning of its batch to its end.
    """

    name: str
    ids: list[int]
    text: str = ""
    token_ids: tuple[int, ...] = ()
    reason: Reason | None = None
    seconds: float = 0.0

    def take(self, piece: Piece, seconds: float) -> None:
        if self.reason is None:
            self.text += piece.text
            self.token_ids += piece.tokens
            self.reason, self.seconds = piece.reason, seconds

    def record(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "reason": self.reason,
            "tokens": len(self.token_ids),
            "token_ids": self.token_ids,
            "prompt_tokens": len(self.ids),
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(len(self.token_ids) / max(self.seconds, 1e-9), 2),
        }

    def summary(self) -> str:
        record = self.record()
        return (
            f"{record['tokens']} tokens (prompt: {record['prompt_tokens']}) in {self.seconds:.2f} s, "
            f"{record['tokens_per_second']:.1f} tokens/s, ended by {self.reason}"
        )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("s2.inference.cli", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--ckpt", type=path, required=True, help="Hugging Face folder, e.g. runs/demo/extend-2k/hf")
    add("--prompt", action="append", default=[], help="a text to continue; may be given several times")
    add("--prompt-file", action="append", default=[], type=path,
        help="a file with one such text (its last newline aside), - for standard input; may be given several times")
    add("--chat", action="store_true", help="each prompt is a message of a user, in the checkpoint's chat template")
    add("--max-new-tokens", type=int, default=128, help="for each prompt (default: %(default)s)")
    add("--stop", action="append", default=[], help="a continuation ends before this text; may be given several times")
    add("--temperature", type=float, help="0 takes the likeliest token (default)")
    add("--top-p", type=float, help="draw from the likeliest tokens that together have this probability (default: 1)")
    add("--top-k", type=int, help="draw from so many of the likeliest tokens (default: 0, all)")
    add("--own-sampling", action="store_true",
        help="where these three are not given, take them from the checkpoint's generation_config.json")
    add("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    add("--json", action="store_true", help="a line of JSON for each prompt instead of text")
    add("--batch-size", type=int, default=8, help="prompts side by side (default: %(default)s)")
    add_prefill_chunk(parser)
    add("--graph", action=argparse.BooleanOptionalAction, default=None,
        help="decode by a CUDA graph (default: where it is possible and there are enough new tokens)")
    add("--device", help="default: the GPU if there is one")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    # fmt: on
    args = parser.parse_args(argv)
    for name in ("max_new_tokens", "batch_size", "prefill_chunk"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not 0 <= args.seed < 1 << 64:
        raise ValueError(f"--seed {args.seed}: expected a whole number from 0 to below 2**64")
    if not all(args.stop):
        raise ValueError("--stop '': every text begins with nothing; name what it ends before")
    return args


def command(argv: Sequence[str]) -> None:
    """What the command line does. Whatever can be said without the weights is said before they are read."""
    args = _arguments(argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    folder = ModelFolder.open(args.ckpt, args.device, dtype, prefill_chunk=args.prefill_chunk)
    sampling = _sampling(args, folder)
    if args.graph and folder.device.type != "cuda":
        raise ValueError(f"--graph: the model is on {folder.device}, and a CUDA graph needs it on a GPU")
    asked = _prompts(args, folder)
    generator = torch.Generator(folder.device).manual_seed(args.seed)
    model = folder.model  # reads the weights
    pool = DecodePool(model) if len(asked) > args.batch_size else None
    options = {"generator": generator, "graph": args.graph, "pool": pool, **sampling}
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    for begin in range(0, len(asked), args.batch_size):
        batch = asked[begin : begin + args.batch_size]
        for pieces in _run(args, folder, batch, options):
            if len(asked) == 1 and not args.json:
                print(pieces[0].text, end="", flush=True)
        for prompt in batch:
            _report(args, prompt, len(asked))


def _run(
    args: argparse.Namespace, folder: ModelFolder, batch: Sequence[_Asked], options: dict[str, Any]
) -> Iterator[list[Piece]]:
    ids, began = [prompt.ids for prompt in batch], time.perf_counter()
    tokens, size = max(map(len, ids)) + args.max_new_tokens, cache_size(folder, ids, args.max_new_tokens)
    smaller = f"--batch-size, now {args.batch_size}, " if len(batch) > 1 else ""
    with memory_for(
        f"generation for {len(batch)} x {tokens} tokens, whose KV cache alone takes {size:,} bytes,",
        folder.device,
        f"lower {smaller}--max-new-tokens or --prefill-chunk, or shorten the prompts",
    ):
        for pieces in stream_texts(folder, ids, args.max_new_tokens, stop=args.stop, **options):
            for prompt, piece in zip(batch, pieces, strict=True):
                prompt.take(piece, time.perf_counter() - began)
            yield pieces


def _report(args: argparse.Namespace, prompt: _Asked, count: int) -> None:
    if args.json:
        print(json.dumps(prompt.record()), flush=True)
        return
    print("" if count == 1 else f"=== {prompt.name}\n{prompt.text}", flush=True)
    print(f"{prompt.name}: {prompt.summary()}", file=sys.stderr, flush=True)


def _sampling(args: argparse.Namespace, folder: ModelFolder) -> dict[str, Any]:
    given = {key: getattr(args, key) for key in ("temperature", "top_p", "top_k") if getattr(args, key) is not None}
    values = {"temperature": 0.0, "top_p": 1.0, "top_k": 0} | (folder.sampling if args.own_sampling else {}) | given
    try:
        check_sampling(**values)
    except ValueError as error:
        name, _, said = str(error).partition("=")
        if name in given:
            raise ValueError(f"--{name.replace('_', '-')} {said}") from None
        raise ValueError(f"{folder.folder}/generation_config.json: {error}") from None
    return values


def _prompts(args: argparse.Namespace, folder: ModelFolder) -> list[_Asked]:
    """All prompts, encoded. Raises ValueError for one that is empty or leaves no room for the new tokens."""
    encoder, asked = TextEncoder(folder), []
    for name, text in _texts(args):
        if not text:
            raise ValueError(f"{name}: the prompt is empty; there is nothing to continue")
        try:
            ids = encoder.encode_chat([{"role": "user", "content": text}]) if args.chat else encoder.encode(text)
        except ValueError as error:
            raise ValueError(f"{'--chat' if args.chat else name}: {error}") from None
        if not ids:
            raise ValueError(f"{name}: {text[:40]!r} has no token in this tokenizer; there is nothing to continue")
        if len(ids) + args.max_new_tokens > folder.max_length:
            raise ValueError(
                f"{name}: {len(ids)} tokens and --max-new-tokens {args.max_new_tokens} make "
                f"{len(ids) + args.max_new_tokens}, more than max_position_embeddings={folder.max_length} in "
                f"{folder.folder}/config.json; shorten the prompt or lower --max-new-tokens"
            )
        asked.append(_Asked(name, ids))
    return asked


def _texts(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The prompts, and what gave them."""
    for i, text in enumerate(args.prompt):
        name = f"--prompt {i + 1}" if len(args.prompt) > 1 else "--prompt"
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes that are no UTF-8 come as halves of characters
            raise ValueError(f"{name}: not a text in UTF-8 ({error.reason})") from None
        yield name, text
    files = args.prompt_file
    if not files and not args.prompt:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give --prompt TEXT, --prompt-file FILE, or a text on standard input")
        files = [_STDIN]
    for file in files:
        name = "standard input" if file == _STDIN else f"--prompt-file {file}"
        if file != _STDIN and not file.exists():
            raise FileNotFoundError(f"{name}: no such file")
        if file.is_dir():
            raise IsADirectoryError(f"{name}: a folder, not a text")
        try:
            text = sys.stdin.read() if file == _STDIN else file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not a text in UTF-8 ({error})") from None
        yield name, text.removesuffix("\n")


def main(argv: Sequence[str] | None = None) -> None:
    command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    ending.run(main)
