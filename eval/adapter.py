"""The `s2` model of lm-eval: log-likelihoods and generation of a checkpoint, with nothing cut off in silence.

Differences from lm-eval's own Hugging Face model, all of them on purpose:
  - sequences of a batch are padded on the right only. Padding on the left would shift a sequence against
    the blocks of the sparse heads, so prompts to continue are batched with prompts of their own length
    instead;
  - BOS is one explicit setting, and the rolling likelihood has one BOS in front, never two;
  - whatever had to be cut is counted, and the count is reported with the results.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from eval.checkpoint import Checkpoint, bos_of
from s2.inference.generate import generate
from s2.model.loss import chunk_rows

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
    Raises:
        FileNotFoundError, ValueError: a folder that is no checkpoint, a max_length beyond the model's, BOS
            asked of a tokenizer without one.
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
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if on_overflow not in ("warn", "error"):
            raise ValueError(f"on_overflow={on_overflow!r}: expected 'warn' or 'error'")
        if isinstance(pretrained, Checkpoint):
            self.checkpoint = pretrained
        else:
            self.checkpoint = Checkpoint.load(pretrained, device, getattr(torch, dtype) if dtype else None)
        limit = self.checkpoint.max_length
        if max_length is not None and not 1 < max_length <= limit:
            raise ValueError(
                f"max_length={max_length}: the checkpoint {self.checkpoint.folder} reads 2 to {limit} tokens"
                " (max_position_embeddings in its config.json)"
            )
        self.max_length = max_length or limit
        self._device = self.checkpoint.device
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(self.checkpoint.folder))
        self.add_bos_token = bos_of(self.checkpoint.tokenizer) is not None if add_bos_token is None else add_bos_token
        if self.add_bos_token and self.tokenizer.bos_token_id is None:
            raise ValueError(f"add_bos_token: the tokenizer in {self.checkpoint.folder} has no BOS token")
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer in {self.checkpoint.folder} has no EOS token; lm-eval needs one")
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.on_overflow = on_overflow
        self.overflow: Counter[str] = Counter()
        self._token_texts: list[str] | None = None

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return str(self.checkpoint.folder).replace("/", "__")

    def bos_setting(self) -> str:
        """For the line above a table: what stands before every text."""
        token = self.tokenizer.convert_ids_to_tokens(self.prefix_token_id)
        return f"yes ({token})" if self.add_bos_token else f"no (empty contexts and rolling windows begin with {token})"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return cast("str", text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with BOS in front as set, unless the text itself starts with it."""
        tokens = self.tokenizer.encode(string, add_special_tokens=False, verbose=False)
        wanted = self.add_bos_token if add_special_tokens is None else add_special_tokens
        bos = self.tokenizer.bos_token_id
        return [bos, *tokens] if wanted and bos is not None and tokens[:1] != [bos] else tokens

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in windows of max_length tokens, the first after one BOS (or EOS)."""
        windows: list[tuple[int, Scored]] = []
        for i, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(i, (None, *utils.make_disjoint_window(window))) for window in rolling]
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm)
        for (i, _), (value, _) in zip(windows, scores, strict=True):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        rows: list[list[int]] = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than"
                    f" max_length={self.max_length} and cannot be scored"
                )
            rows.append(self._fit([*context, *continuation], self.max_length + 1, "request")[:-1])
        bar = tqdm(total=len(rows), disable=disable_tqdm, desc="loglikelihood", unit="request")
        for batch in self._batches([len(row) for row in rows]):
            scored = self._score_batch([rows[i] for i in batch], [requests[i][2] for i in batch])
            for i, result in zip(batch, scored, strict=True):
                results[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
            bar.update(len(batch))
        bar.close()
        return cast("list[tuple[float, bool]]", results)

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
        values, hits = [], []
        # The logits of a long window over a large vocabulary would not fit; a few thousand positions at a
        # time do.
        size = chunk_rows(self.checkpoint.config.vocab_size)
        for positions, tokens in zip(scored.split(size), wanted.split(size), strict=True):
            scores = F.log_softmax(model.lm_head(positions).float(), dim=-1)  # [<=size, V]
            values.append(scores.gather(1, tokens[:, None])[:, 0].double())
            hits.append(scores.argmax(-1) == tokens)
        per_request = zip(torch.cat(values).split(lengths), torch.cat(hits).split(lengths), strict=True)
        return [(value.sum().item(), bool(hit.all())) for value, hit in per_request]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop sequence or max_gen_toks; greedy unless the request says otherwise."""
        results: list[str | None] = [None] * len(requests)
        groups: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        prompts: list[list[int]] = []
        settings: list[dict[str, Any]] = []
        for i, request in enumerate(requests):
            text, given = request.args
            options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"a request generates up to {options['max_gen_toks']} tokens, which leaves no room for"
                    f" a prompt in max_length={self.max_length}; lower max_gen_toks"
                )
            prompts.append(self._fit(self.tok_encode(text), room, "prompt"))
            settings.append(options)
            groups[repr(sorted(given.items())), len(prompts[-1])].append(i)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until", unit="request")
        for (_, length), members in sorted(groups.items(), key=lambda item: -item[0][1]):
            rows = self._rows_of(length + settings[members[0]]["max_gen_toks"])
            for first in range(0, len(members), rows):
                batch = members[first : first + rows]
                texts = self._generate_batch([prompts[i] for i in batch], settings[batch[0]])
                for i, text in zip(batch, texts, strict=True):
                    results[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(batch))
        bar.close()
        return cast("list[str]", results)

    @torch.inference_mode()
    def _generate_batch(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        eos_text = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stops = handle_stop_sequences(options["until"], eos=eos_text)
        input_ids = torch.tensor(prompts, device=self._device)
        output = generate(
            self.checkpoint.model,
            input_ids,
            options["max_gen_toks"],
            temperature=options.get("temperature", 0.0) if options["do_sample"] else 0.0,
            top_p=options.get("top_p", 1.0),
            eos_token_id=[self.eot_token_id, *self._tokens_that_stop(tuple(stops))],
        )
        texts = []
        for row in output.tolist():
            end = row.index(self.eot_token_id) if self.eot_token_id in row else len(row)
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, stops, None))
        return texts

    def _tokens_that_stop(self, stops: tuple[str, ...]) -> list[int]:
        """Tokens that contain a stop sequence, so that generation need not go on after it."""
        if self._token_texts is None:
            self._token_texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return [i for i, text in enumerate(self._token_texts) if any(stop and stop in text for stop in stops)]

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

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices of the batches, longest rows first: running out of memory happens at once or not at all."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            rows = self._rows_of(lengths[order[0]])
            yield order[:rows]
            order = order[rows:]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results' `config`."""
        return self.checkpoint.describe() | {
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "model_num_parameters": self.checkpoint.config.num_parameters(),
        }
