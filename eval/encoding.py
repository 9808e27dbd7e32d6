"""Questions with their answers, and lm-eval's chats, as token ids of a checkpoint."""

from collections.abc import Sequence

from s2.inference.encoding import Message, TextEncoder
from s2.inference.folder import ModelFolder


class PromptEncoder(TextEncoder):
    """Encodes for one checkpoint, as `TextEncoder` does.

    Raises:
        ValueError: BOS is asked of a checkpoint without one, or there is no end-of-text token.
    """

    def __init__(self, checkpoint: ModelFolder, add_bos_token: bool | None = None) -> None:
        super().__init__(checkpoint, add_bos_token)
        if not checkpoint.eos_ids:
            raise ValueError(f"{checkpoint.folder}/config.json has no eos_token_id; lm-eval needs one")

    @property
    def prefix_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, or else the end of another text."""
        return self.folder.eos_ids[0] if self.bos_id is None else self.bos_id

    def bos_setting(self) -> str:
        """For the line above a table: what stands before every text."""
        token = self.tokenizer.id_to_token(self.prefix_id)
        return f"yes ({token})" if self.add_bos_token else f"no (empty contexts and rolling windows begin with {token})"

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

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The chat template filled in. From then on special tokens in a text are read as such, because the template
        writes them."""
        self.tokenizer = self.reads_special
        return super().chat(messages, add_generation_prompt)
