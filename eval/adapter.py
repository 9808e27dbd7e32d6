"""The `s2` model of lm-eval: log-likelihoods and generation of a checkpoint, with nothing cut off in silence.

Differences from lm-eval's own Hugging Face model, all of them on purpose:
  - sequences of a batch are padded on the right only. Padding on the left would shift a sequence against
    the blocks of the sparse heads, so prompts to continue are batched with prompts of their own length
    instead;
  - token ids are those of tokenizer.json, as in training, and text that spells a special token is text, except in
    prompts that a chat template has written;
  - BOS is one explicit setting, and the rolling likelihood has one BOS in front, never two;
  - an answer that the tokenizer would join with the end of its context is tokenized by itself, so that its characters
    are scored, all of them and no others;
  - logits are float32 whatever the weights are, so that hardly any two are equal;
  - whatever had to be cut is counted, and the count is reported with the results; options of generation that are not
    implemented are refused.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences

from eval.checkpoint import Checkpoint
from eval.encoding import PromptEncoder
from eval.results import Answers
from eval.sampling import MAX_NEW_TOKENS, Sampling
from s2.arguments import DTYPES
from s2.inference.cache import KVCache
from s2.inference.checks import whole
from s2.inference.folder import memory_for
from s2.inference.pool import DecodePool
from s2.inference.prefill import PREFILL_CHUNK
from s2.inference.text import continue_texts
from s2.progress import progress

log = logging.getLogger(__name__)

Scored = tuple[Any, list[int], list[int]]


@register_model("s2")
class S2LM(TemplateLM):
    """One of our Hugging Face folders, as lm-eval sees it: `lm_eval.simple_evaluate(S2LM(folder), ...)`.

    Args:
        pretrained: the folder.
        device, dtype: default: bfloat16 on the GPU if there is one, else float32 on the CPU.
        max_length: longest sequence in tokens (default and upper bound: max_position_embeddings).
        batch_size: rows of a batch; "auto" fills `batch_tokens`.
        batch_tokens: tokens of a batch, padding included; a longer sequence is a batch of its own.
        add_bos_token: put BOS before every text (None: as the checkpoint's tokenizer does).
        on_overflow: "warn" cuts what is longer than max_length on the left and reports it, "error" stops.
        prefill_chunk: tokens of a prompt that are read at once before it is continued.
    Raises:
        FileNotFoundError, ValueError: a folder that is no checkpoint, a max_length beyond the model's, BOS
            asked of a tokenizer without one, a setting out of range.
    """

    def __init__(
        self,
        pretrained: str | Path | Checkpoint,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = "auto",
        batch_tokens: int = 16384,
        add_bos_token: bool | None = None,
        on_overflow: str = "warn",
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        super().__init__()
        if on_overflow not in ("warn", "error"):
            raise ValueError(f"on_overflow={on_overflow!r}: expected 'warn' or 'error'")
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype={dtype!r}: expected {', '.join(DTYPES)}")
        whole("batch_tokens", batch_tokens, 1)
        if batch_size != "auto" and not (str(batch_size).isdecimal() and int(batch_size) > 0):
            raise ValueError(f"batch_size={batch_size!r}: expected a number of rows, or 'auto'")
        if isinstance(pretrained, Checkpoint):
            if device is not None or dtype is not None or prefill_chunk != PREFILL_CHUNK:
                given = f"device={device}, dtype={dtype}, prefill_chunk={prefill_chunk}"
                raise ValueError(f"{given}: the checkpoint is loaded already")
            self.checkpoint = pretrained
        else:
            kind = getattr(torch, dtype) if dtype else None
            self.checkpoint = Checkpoint.load(pretrained, device, kind, prefill_chunk=prefill_chunk)
        limit = self.checkpoint.max_length
        if max_length is not None and not 1 < whole("max_length", max_length, 1) <= limit:
            raise ValueError(
                f"max_length={max_length}: the checkpoint {self.checkpoint.folder} reads 2 to {limit} tokens"
                " (max_position_embeddings in its config.json)"
            )
        self.max_length = max_length or limit
        self._device = self.checkpoint.device
        self.encoder = PromptEncoder(self.checkpoint, add_bos_token)
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.on_overflow = on_overflow
        self.overflow: Counter[str] = Counter()
        self.answers: Answers | None = None  # of an interrupted evaluation

    @property
    def eot_token_id(self) -> int:
        return self.checkpoint.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self.encoder.prefix_id

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return str(self.checkpoint.folder).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.encoder.chat(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.encoder.encode(string, with_bos=add_special_tokens)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each answer after its context, and whether greedy decoding would say it.

        Raises ValueError for an answer without a token, or that cannot be told from its context.
        """

        def score(fresh: Sequence[Instance]) -> list[tuple[float, bool]]:
            encoded = [(request.args, *self.encoder.pair(*request.args)) for request in fresh]
            return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

        return self._answer("loglikelihood", requests, score)

    def _answer(self, kind: str, requests: Sequence[Instance], compute: Callable[[Sequence[Instance]], list]) -> list:
        """What an interrupted evaluation has answered already, and of the rest what `compute` returns."""
        if self.answers is None:
            return compute(requests)
        known = [self.answers.get(kind, request.args) for request in requests]
        self.overflow.update(cut for _, cut in filter(None, known) if cut)
        computed = iter(compute([request for request, answer in zip(requests, known, strict=True) if answer is None]))
        return [next(computed) if answer is None else answer[0] for answer in known]

    def _keep(self, kind: str, args: Any, result: Any, cut: str | None = None) -> None:
        self.cache_hook.add_partial(kind, args, result)
        if self.answers is not None:
            self.answers.add(kind, args, result, cut)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in windows of max_length tokens, the first after one BOS (or EOS)."""
        return self._answer("loglikelihood_rolling", requests, lambda fresh: self._rolling(fresh, disable_tqdm))

    def _rolling(self, requests: Sequence[Instance], disable_tqdm: bool) -> list[float]:
        windows: list[tuple[int, Scored]] = []
        for i, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(i, (None, *utils.make_disjoint_window(window))) for window in rolling]
        totals, left = [0.0] * len(requests), Counter(i for i, _ in windows)

        def add(index: int, result: tuple[float, bool]) -> None:
            i = windows[index][0]
            totals[i] += result[0]
            left[i] -= 1
            if left[i] == 0:
                self._keep("loglikelihood_rolling", requests[i].args, totals[i])

        self._score([window for _, window in windows], add, disable_tqdm)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def take(index: int, result: tuple[float, bool]) -> None:
            results[index] = result
            asked, context, answer = requests[index]
            if asked is not None:
                cut = "request" if len(context) + len(answer) > self.max_length + 1 else None
                self._keep("loglikelihood", asked, result, cut)

        self._score(requests, take, disable_tqdm)
        return results

    def _score(
        self, requests: Sequence[Scored], take: Callable[[int, tuple[float, bool]], None], disable_tqdm: bool
    ) -> None:
        """Score requests, longest first, and hand each result to `take` as soon as it is there."""
        rows: list[list[int]] = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than"
                    f" max_length={self.max_length} and cannot be scored"
                )
            rows.append(self._fit([*context, *continuation], self.max_length + 1, "request")[:-1])
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # memory runs out at once or not at all
        with progress("loglikelihood", len(rows), "request", quiet=disable_tqdm) as bar:
            while order:
                size = self._rows_of(len(rows[order[0]]))
                batch, order = order[:size], order[size:]
                with self._memory_for(len(batch), len(rows[batch[0]])):
                    scored = self._score_batch([rows[i] for i in batch], [requests[i][2] for i in batch])
                for i, result in zip(batch, scored, strict=True):
                    take(i, result)
                bar.update(len(batch))

    @torch.inference_mode()
    def _score_batch(self, rows: list[list[int]], targets: list[list[int]]) -> list[tuple[float, bool]]:
        """Sum of log-probabilities, and whether all are greedy, of each row's targets.

        rows[b]: inputs whose last len(targets[b]) positions predict targets[b]; rows may differ in length.
        """
        model, lengths = self.checkpoint.model, [len(target) for target in targets]
        input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for b, row in enumerate(rows):
            input_ids[b, : len(row)] = torch.tensor(row)
        # Causal attention: padding on the right changes nothing before it.
        hidden = model.model(input_ids.to(self._device), None, None)  # [B, S, E]
        scored = torch.cat([hidden[b, len(row) - lengths[b] : len(row)] for b, row in enumerate(rows)])  # [N, E]
        wanted = torch.tensor([token for target in targets for token in target], device=self._device)
        found = self.checkpoint.log_likelihoods(scored, wanted)
        values, hits = (part.cpu() for part in found)  # at once: each number that is asked of a GPU waits for it
        per_request = zip(values.split(lengths), hits.split(lengths), strict=True)
        return [(value.sum().item(), bool(hit.all())) for value, hit in per_request]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop sequence or max_gen_toks; greedy unless the request says otherwise.

        Requests with a `seed` are drawn with it, in order, so that the same requests give the same texts; others with
        torch's own random numbers, which lm-eval seeds.

        Raises ValueError for an option that is not implemented (see `Sampling`) or leaves no room for a prompt.
        """
        return self._answer("generate_until", requests, lambda fresh: self._continue(fresh, disable_tqdm))

    def _continue(self, requests: Sequence[Instance], disable_tqdm: bool) -> list[str]:
        results, cut = [""] * len(requests), [""] * len(requests)
        groups: defaultdict[tuple[Sampling, int], list[int]] = defaultdict(list)
        prompts: list[list[int]] = []
        for i, request in enumerate(requests):
            text, given = request.args
            options = Sampling.read(given)
            room = self.max_length - options.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"a request generates up to {options.max_new_tokens} tokens, which leaves no room for"
                    f" a prompt in max_length={self.max_length}; lower max_gen_toks"
                )
            tokens = self.tok_encode(text) or [self.prefix_token_id]
            cut[i] = "prompt" if len(tokens) > room else ""
            prompts.append(self._fit(tokens, room, "prompt"))
            groups[options, len(prompts[-1])].append(i)
        generators = {options: options.generator(self._device) for options, _ in groups}
        batches: list[tuple[Sampling, int, list[int]]] = []  # with the tokens of a row, the longest prompts first
        for (options, length), members in sorted(groups.items(), key=lambda item: -item[0][1]):
            width = length + options.max_new_tokens
            rows = self._rows_of(width)
            batches += [(options, width, members[first : first + rows]) for first in range(0, len(members), rows)]
        pool = self._pool_for({(len(batch), width) for _, width, batch in batches})
        with progress("generate_until", len(requests), "request", quiet=disable_tqdm) as bar:
            for options, width, batch in batches:
                with self._memory_for(len(batch), width):
                    texts = self._generate_batch([prompts[i] for i in batch], options, generators[options], pool)
                for i, text in zip(batch, texts, strict=True):
                    results[i] = text
                    if options.temperature == 0:  # what is drawn differs each time
                        self._keep("generate_until", requests[i].args, text, cut[i] or None)
                bar.update(len(batch))
        return results

    def _pool_for(self, sizes: Collection[tuple[int, int]]) -> DecodePool:
        """With memory for the largest cache of batches of so many rows and tokens: where rows are shorter there are
        more of them, which together may take more."""
        pool = DecodePool(self.checkpoint.model)
        if sizes:
            config, dtype = self.checkpoint.config, self.checkpoint.dtype
            # the last token drawn is never fed back
            rows, width = max(sizes, key=lambda size: KVCache.bytes_for(config, size[0], size[1] - 1, dtype))
            with self._memory_for(rows, width):
                pool.reserve(rows, width - 1)
        return pool

    def _generate_batch(
        self, prompts: list[list[int]], options: Sampling, generator: torch.Generator | None, pool: DecodePool
    ) -> list[str]:
        eos_text = self.checkpoint.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        said = continue_texts(
            self.checkpoint,
            prompts,
            options.max_new_tokens,
            stop=[stop for stop in handle_stop_sequences(list(options.until), eos=eos_text) if stop],
            is_apart=True,  # as lm-eval's own model decodes them
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            generator=generator,
            pool=pool,
        )
        return [each.text for each in said]

    def _memory_for(self, rows: int, width: int) -> Any:
        smaller = f"lower --batch-tokens, now {self.batch_tokens}" if rows > 1 else "lower --max-length"
        return memory_for(f"a batch of {rows} x {width} tokens", self._device, smaller)

    def _fit(self, tokens: list[int], limit: int, what: str) -> list[int]:
        """The last `limit` tokens. Cutting is counted and said once, or an error, as `on_overflow` has it."""
        if len(tokens) <= limit:
            return tokens
        room = f"max_length={self.max_length} (room for {limit})"
        message = f"a {what} of {len(tokens)} tokens is too long for {room}"
        if self.on_overflow == "error":
            raise ValueError(f"{message}; evaluate a checkpoint with a longer context, or allow cutting")
        if not self.overflow[what]:
            log.warning("%s: its beginning is cut off, and so it goes with all others that are too long", message)
        self.overflow[what] += 1
        return tokens[-limit:]

    def overflow_note(self) -> str:
        """How many inputs were cut, for the line above a table."""
        cut = ", ".join(f"{count} {what}(s)" for what, count in self.overflow.items() if count)
        return f"{cut} cut on the left to max_length={self.max_length}" if cut else "none"

    def _rows_of(self, width: int) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        return max(1, self.batch_tokens // width)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results' `config`."""
        return self.checkpoint.describe() | {
            "max_length": self.max_length,
            "add_bos_token": self.encoder.add_bos_token,
            "model_num_parameters": self.checkpoint.config.num_parameters(),
        }
