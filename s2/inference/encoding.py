"""Texts and chats as token ids of a model folder.

Token ids are those of tokenizer.json, as in training. Text that spells a special token is text, except in prompts that
a chat template has written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from tokenizers import Tokenizer

from .folder import ModelFolder, bos_of

Message = Mapping[str, str]  # role and content


class TextEncoder:
    """Encodes for one folder.

    Args:
        folder: whose tokenizer, special ids and chat template are used.
        add_bos_token: put BOS before every text; None: as the tokenizer does.

    Attributes:
        bos_id: what stands before a text: the tokenizer's, or else config.json's; None where neither has one.

    Raises:
        ValueError: BOS is asked of a folder without one.
    """

    def __init__(self, folder: ModelFolder, add_bos_token: bool | None = None) -> None:
        self.folder = folder
        own = bos_of(folder.tokenizer)
        self.bos_id = folder.config.bos_token_id if own is None else own
        self.add_bos_token = own is not None if add_bos_token is None else add_bos_token
        if self.add_bos_token and self.bos_id is None:
            raise ValueError(f"add_bos_token: the checkpoint {folder.folder} has no BOS token")
        self.tokenizer = folder.tokenizer

    def encode(self, text: str, with_bos: bool | None = None) -> list[int]:
        """Token ids, with BOS in front (None: as set), unless the text itself starts with it."""
        return self._ids(self.tokenizer, text, with_bos)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, up to where the model is to answer. Special tokens are read as such, those of the
        messages too.

        Raises:
            ValueError: the folder has no chat template, or it does not take these messages.
        """
        return self._ids(self.reads_special, self.chat(messages))

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The folder's chat template as transformers fills it in.

        Raises:
            ValueError: as `encode_chat`.
        """
        if self._templates.chat_template is None:
            raise ValueError(
                f"{self.folder.folder}: there is no chat template in it (chat_template.jinja, or chat_template in "
                "tokenizer_config.json), so the model takes plain prompts"
            )
        from jinja2 import TemplateError

        try:
            text = self._templates.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except (TemplateError, TypeError) as error:  # the second of values that it joins to text
            raise ValueError(f"{self.folder.folder}: the chat template does not take these messages: {error}") from None
        return cast("str", text)

    @cached_property
    def reads_special(self) -> Tokenizer:
        """The tokenizer for what a chat template has written."""
        tokenizer = Tokenizer.from_str(self.folder.tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    def _ids(self, tokenizer: Tokenizer, text: str, with_bos: bool | None = None) -> list[int]:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        size = self.folder.config.vocab_size
        if tokens and max(tokens) >= size:  # a special token of a chat template, or `load_tokenizer` had refused it
            token = tokenizer.id_to_token(max(tokens))
            raise ValueError(
                f"the chat template writes {token!r}, for which the model of {size} tokens has no embedding"
            )
        wanted = self.add_bos_token if with_bos is None else with_bos
        return [self.bos_id, *tokens] if wanted and self.bos_id is not None and tokens[:1] != [self.bos_id] else tokens

    @cached_property
    def _templates(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.folder.folder))
