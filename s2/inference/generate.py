"""Generation: prefill the prompts, then decode token by token from the cache."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from s2.model.transformer import Transformer

from .cache import KVCache
from .checks import check_sampling, check_tokens, check_whole_tensors, whole
from .graph import Step, decode_step
from .pool import DecodePool, new_cache
from .prefill import PREFILL_CHUNK, prefill

IsEnough = Callable[[Tensor], Sequence[bool] | Tensor]


def generate(
    model: Transformer,
    input_ids: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    is_enough: IsEnough | None = None,
    cache: KVCache | None = None,
    graph: bool | None = None,
    pool: DecodePool | None = None,
) -> Tensor:
    """Continue a batch of prompts, each as if it were alone.

    Args:
        model: on its device, in its dtype.
        input_ids: int64 `[B, S]`, with padding on the right where `lengths` say so; or prompts `[S_b]` one by one. On
            the host or on the model's device; there the host waits once, to see that the model has all tokens.
        max_new_tokens: at most so many tokens are added.
        temperature: 0 takes the likeliest token, otherwise logits are divided by it and a token is drawn.
        top_p: draw only from the likeliest tokens that together reach this probability (nucleus sampling,
            arXiv 1904.09751). With `top_k`, of those.
        eos_token_id: one or several ids that end a row; None: none does. Rows that ended are filled with their last
            token; generation stops early when all have.
        lengths: tokens of each prompt, of whatever token the padding behind them is. None: all rows are full.
        top_k: draw only from so many of the likeliest tokens, and those as likely as the last of them; 0 from all.
        generator: random numbers for the draw, on the model's device.
        prefill_chunk: feed the prompts in pieces of so many tokens of each, which bounds activation memory at long
            context.
        is_enough: is asked after each token, of the new ones `[B, n]` on the host, which rows need no more. A row for
            which it once said so counts as ended.
        cache: the prompts continue what it holds; by default a new one. As `stream` leaves it.
        graph: whether decode steps are captured in a CUDA graph and replayed (`s2.inference.graph`); None: where it is
            possible and `max_new_tokens` are enough for it.
        pool: lends cache and captured decode step, to one batch after another.

    Returns:
        int64 `[B, n]`, the new tokens only, `n <= max_new_tokens`.

    Raises:
        ValueError: a token that the model has not, prompt and new tokens exceed max_position_embeddings or the cache,
            an option is of another type or out of range, `graph` is True and none is possible, or `pool` is another
            model's or there is a `cache`, too.
    """
    steps = stream(
        model, input_ids, max_new_tokens, temperature, top_p, eos_token_id, lengths=lengths, top_k=top_k,
        generator=generator, prefill_chunk=prefill_chunk, is_enough=is_enough, cache=cache, graph=graph,
        pool=pool,
    )  # fmt: skip
    with closing(steps):  # a traceback that somebody keeps shall not keep what a pool has lent
        return torch.stack([drawn.tokens for drawn in steps], dim=1)


class Drawn:
    """One new token of each row.

    Attributes:
        tokens: int64 `[B]`, on the model's device. A row that ended before has its last token once more.
        ended: of each row, whether it has ended, with this token or before.
    """

    def __init__(self, tokens: Tensor, ended: Sequence[bool]) -> None:
        self.tokens, self.ended = tokens, tuple(ended)

    @cached_property
    def ids(self) -> list[int]:
        """`tokens` on the host. Waits for the device, unless it was asked already whether rows end."""
        return self.tokens.tolist()


def stream(
    model: Transformer,
    input_ids: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    is_enough: IsEnough | None = None,
    cache: KVCache | None = None,
    graph: bool | None = None,
    pool: DecodePool | None = None,
) -> Generator[Drawn]:
    """`generate`, token by token, with its arguments. The next token is computed when it is asked for; the host waits
    for the device once a token where rows can end, and before all of them once, for prompts that are on the device.

    Closing the iterator before its end, or an exception out of it, leaves the model as it was. A `cache` of the
    caller's then holds, as it does after the end, of each row what it held before, the prompt and all new tokens but
    the last one (a row that had ended: its last token as often as others went on); `truncate` takes back what is too
    much. If a prompt or a token failed while it was computed, the cache holds what it held before that piece; where
    keys that this needs were overwritten, the next call says so.

    Raises:
        ValueError: as `generate`; what the arguments say by themselves before the iterator is returned.
    """
    check_sampling(temperature, top_p, top_k)
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    prefill_chunk = whole("prefill_chunk", prefill_chunk, 1)
    device = model.model.embed_tokens.weight.device
    _check_objects(generator, is_enough, graph, cache, pool, device, draws=temperature > 0)
    ends = _ends(eos_token_id)
    input_ids, prompts = _padded(input_ids, lengths)
    _check_room(model, prompts, max_new_tokens, cache)
    if pool is not None and (pool.model is not model or cache is not None):
        raise ValueError("pool= lends a cache of the model it was made for: leave cache= out, and give it that model")
    check_tokens(input_ids, model.config.vocab_size)
    input_ids = input_ids.to(device)

    def draw(logits: Tensor) -> Tensor:
        return _draw(logits, temperature, top_p, top_k, generator)

    return _stream(model, input_ids, prompts, max_new_tokens, draw, ends, prefill_chunk, is_enough, cache, graph, pool)


@torch.inference_mode()
def _stream(
    model: Transformer,
    input_ids: Tensor,
    prompts: list[int],
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    ends: frozenset[int],
    prefill_chunk: int,
    is_enough: IsEnough | None,
    cache: KVCache | None,
    graph: bool | None,
    pool: DecodePool | None,
) -> Generator[Drawn]:
    batch, width = input_ids.shape
    length = width + max_new_tokens - 1  # the last token drawn is never fed back
    with ExitStack() as stack:
        if pool is not None:
            cache, step = stack.enter_context(pool.lend(batch, length, max_new_tokens, graph))
        else:
            cache = new_cache(model, batch, length) if cache is None else cache
            step = decode_step(model, cache, max_new_tokens, graph)
        logits = prefill(model, cache, input_ids, prefill_chunk, lengths=prompts)
        yield from _decode(step, logits, max_new_tokens, draw, ends, is_enough)


def _decode(
    step: Step,
    logits: Tensor,
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    ends: frozenset[int],
    is_enough: IsEnough | None,
) -> Iterator[Drawn]:
    """New tokens, the first of them after the prompts' last logits `[B, 1, V]`."""
    batch = len(logits)
    said = torch.empty((batch, 0 if is_enough is None else max_new_tokens), dtype=torch.int64, device="cpu")
    ended = [False] * batch
    held: tuple[Tensor, Tensor] | None = None  # which rows have ended, and the token that each repeats
    for count in range(1, max_new_tokens + 1):
        token = draw(logits[:, -1])
        if held is not None:
            token = torch.where(*held, token)
        drawn, before = Drawn(token, ended), ended
        if ends or is_enough is not None:
            ended = [was or index in ends for was, index in zip(ended, drawn.ids, strict=True)]
            if is_enough is not None:
                said[:, count - 1] = torch.tensor(drawn.ids, device="cpu")
                ended = _either(ended, is_enough(said[:, :count]))
            drawn.ended = tuple(ended)
            if ended != before:
                held = torch.tensor(ended, device="cpu").to(token.device, non_blocking=True), token
        yield drawn
        if all(ended) or count == max_new_tokens:
            return
        logits = step(token[:, None])


def _padded(input_ids: Tensor | Sequence[Tensor], lengths: Tensor | Sequence[int] | None) -> tuple[Tensor, list[int]]:
    """Prompts as int64 `[B, S]`, with zeros behind them, and the tokens of each, S of the longest."""
    if not isinstance(input_ids, Tensor):
        rows = list(input_ids) if isinstance(input_ids, Iterable) else [input_ids]
        if lengths is not None or not rows or not all(isinstance(row, Tensor) and row.dim() == 1 for row in rows):
            got = [list(row.shape) if isinstance(row, Tensor) else type(row).__name__ for row in rows[:8]]
            raise ValueError(f"input_ids must be [B, S], with lengths, or prompts [S] one by one, got {got}")
        check_whole_tensors(rows)
        lengths, input_ids = [len(row) for row in rows], pad_sequence(rows, batch_first=True)
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be [B, S] with at least one token, got {list(input_ids.shape)}")
    check_whole_tensors([input_ids])
    batch, width = input_ids.shape
    prompts = [width] * batch if lengths is None else _lengths(lengths, batch, width)
    input_ids = input_ids[:, : max(prompts)].long()
    if min(prompts) < input_ids.shape[1]:
        ends = torch.tensor(prompts, device=input_ids.device)[:, None]
        input_ids = input_ids.where(torch.arange(input_ids.shape[1], device=input_ids.device) < ends, 0)
    return input_ids, prompts


def _lengths(given: Tensor | Sequence[int], batch: int, width: int) -> list[int]:
    values = given.tolist() if isinstance(given, Tensor) else given
    values = list(values) if isinstance(values, Iterable) else [values]
    try:
        prompts = [whole("lengths", value, 1) for value in values]
    except ValueError:
        prompts = []
    if len(prompts) != batch or max(prompts) > width:
        raise ValueError(f"lengths={values} must be {batch} numbers from 1 to {width}, the width of input_ids")
    return prompts


def _ends(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """Ids that end a row; of any kind of whole numbers, also in tensors and arrays."""
    try:
        given = [] if eos_token_id is None else torch.as_tensor(eos_token_id, device="cpu").flatten().tolist()
        return frozenset(whole("eos_token_id", index, 0) for index in given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"eos_token_id={eos_token_id!r} must be token ids, or None: no token ends a row") from None


def _draw(logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits `[B, V]`, int64 `[B]`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # the greatest is 0: divided by the least that float32 and its reciprocal hold it is the only one left
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probs = torch.softmax(logits, dim=-1)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        before = ranked.cumsum(dim=-1) - ranked  # probability of all likelier tokens
        ranked[:, 1:] = ranked[:, 1:].masked_fill(before[:, 1:] >= top_p, 0.0)  # the likeliest stays
        drawn = torch.multinomial(ranked, 1, generator=generator)
        return order.gather(1, drawn).squeeze(1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def _either(ended: list[bool], said: Sequence[bool] | Tensor) -> list[bool]:
    """The rows that have ended, with those of which `is_enough` said so."""
    try:
        enough = torch.as_tensor(said, dtype=torch.bool, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"is_enough gave {said!r:.80}; it must say true or false of each row") from None
    if enough.shape != (len(ended),):
        raise ValueError(f"is_enough gave {list(enough.shape)} for {len(ended)} rows; it must say it of each row")
    return [was or is_now for was, is_now in zip(ended, enough.tolist(), strict=True)]


def _check_objects(
    generator: torch.Generator | None,
    is_enough: IsEnough | None,
    graph: bool | None,
    cache: KVCache | None,
    pool: DecodePool | None,
    device: torch.device,
    *,
    draws: bool,
) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator={generator!r} must be a torch.Generator")
    if draws and generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}, and the model draws on {device}")
    if is_enough is not None and not callable(is_enough):
        raise ValueError(f"is_enough={is_enough!r} must be a function of the new tokens")
    if graph is not None and not isinstance(graph, bool):
        raise ValueError(f"graph={graph!r} must be True, False or None")
    if cache is not None and not isinstance(cache, KVCache):
        raise ValueError(f"cache={cache!r} must be a KVCache")
    if pool is not None and not isinstance(pool, DecodePool):
        raise ValueError(f"pool={pool!r} must be a DecodePool")


def _check_room(model: Transformer, prompts: list[int], max_new_tokens: int, cache: KVCache | None) -> None:
    total, longest = max(prompts) + max_new_tokens, model.config.max_position_embeddings
    if total > longest:
        raise ValueError(
            f"{max(prompts)} prompt tokens and max_new_tokens={max_new_tokens} make {total}, more than "
            f"max_position_embeddings={longest}; shorten the prompt or load the model with a larger value"
        )
    if cache is None:
        return
    if len(cache.lengths) != len(prompts):
        raise ValueError(f"the cache was made for {len(cache.lengths)} sequences, and there are {len(prompts)} prompts")
    # the last token drawn is never fed back
    total = max(map(sum, zip(cache.lengths, prompts, strict=True))) + max_new_tokens - 1
    if total > cache.max_length:
        raise ValueError(
            f"what the cache holds, the prompt and max_new_tokens={max_new_tokens} make {total} tokens to keep, more "
            f"than its max_length={cache.max_length}; make a longer one or truncate it"
        )
