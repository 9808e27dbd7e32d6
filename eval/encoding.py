"""Texts, questions with answers and chats as token ids of a checkpoint.

Token ids are those of tokenizer.json, as in training. Text that spells a special token is text, except in prompts that
a chat template has written.
"""

from functools import cached_property
from typing import Any, cast

from tokenizers import Tokenizer

from eval.checkpoint import Checkpoint, bos_of


class PromptEncoder:
    """Encodes for one checkpoint.

    Args:
        checkpoint: whose tokenizer, special ids and chat template are used.
        add_bos_token: put BOS before every text; None: as the tokenizer does.
    Raises:
        ValueError: BOS is asked of a checkpoint without one, or there is no end-of-text token.
    """

    def __init__(self, checkpoint: Checkpoint, add_bos_token: bool | None = None) -> None:
        self._checkpoint = checkpoint
        own = bos_of(checkpoint.tokenizer)
        self.bos_id = checkpoint.config.bos_token_id if own is None else own
        self.add_bos_token = own is not None if add_bos_token is None else add_bos_token
        if self.add_bos_token and self.bos_id is None:
            raise ValueError(f"add_bos_token: the checkpoint {checkpoint.folder} has no BOS token")
        if not checkpoint.eos_ids:
            raise ValueError(f"{checkpoint.folder}/config.json has no eos_token_id; lm-eval needs one")
        self.tokenizer = checkpoint.tokenizer

    @property
    def prefix_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, or else the end of another text."""
        return self._checkpoint.eos_ids[0] if self.bos_id is None else self.bos_id

    def bos_setting(self) -> str:
        """For the line above a table: what stands before every text."""
        token = self.tokenizer.id_to_token(self.prefix_id)
        return f"yes ({token})" if self.add_bos_token else f"no (empty contexts and rolling windows begin with {token})"

    def encode(self, text: str, with_bos: bool | None = None) -> list[int]:
        """Token ids, with BOS in front (None: as set), unless the text itself starts with it."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        size = self._checkpoint.config.vocab_size
        if tokens and max(tokens) >= size:  # a special token of a chat template, or `load_tokenizer` had refused it
            token = self.tokenizer.id_to_token(max(tokens))
            raise ValueError(
                f"the chat template writes {token!r}, for which the model of {size} tokens has no embedding"
            )
        wanted = self.add_bos_token if with_bos is None else with_bos
        return [self.bos_id, *tokens] if wanted and self.bos_id is not None and tokens[:1] != [self.bos_id] else tokens

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def pair(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a context (at least one) and of its answer (at least one).

        White space between them belongs to the answer. The answer has the tokens that context and answer together give
        it; where it would share one with the context, it has those that spell its own characters.

        Raises ValueError for an answer without a token, or that cannot be told from its context.
        """
        asked = f"the answer {answer!r} after {context[-40:]!r}"
        bare = context.rstrip()
        answer = context[len(bare) :] + answer
        if bare:
            head, whole = self.encode(bare), self.encode(bare + answer)
            tokens = whole[len(head) :]
            if whole[: len(head)] != head:
                tokens = self._apart(head, whole, answer, asked)
        else:
            head, tokens = [self.prefix_id], self.encode(answer, with_bos=False)
            if tokens[:1] == head:
                tokens = tokens[1:]
        if not tokens:
            raise ValueError(f"{asked} has no token; the likelihood of nothing says nothing")
        return head, tokens

    def _apart(self, head: list[int], whole: list[int], answer: str, asked: str) -> list[int]:
        """Tokens that spell the rest of `whole` after `head`. A tokenizer that marks the beginning of a text
        (SentencePiece) is asked for those of the answer behind some other text."""
        spelled = self.decode(whole)
        for lead in ("", "\n", ".", "a"):
            before, both = (self.encode(lead + text, with_bos=False) for text in ("", answer))
            tokens = both[len(before) :]
            if both[: len(before)] == before and self.decode(head + tokens) == spelled:
                return tokens
        raise ValueError(f"{asked} shares a token with its context, and cannot be tokenized without it")

    def chat(self, history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The checkpoint's chat template as transformers fills it in. From then on special tokens in a text are read
        as such, because the template writes them."""
        if self.tokenizer is self._checkpoint.tokenizer:
            self.tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
            self.tokenizer.encode_special_tokens = False
        text = self._templates.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return cast("str", text)

    @cached_property
    def _templates(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self._checkpoint.folder))
