"""Make content of records: a record holds text, token ids, or the messages of a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from indexcache.data.documents import ids_digest, text_digest

ALL = "all"  # In results, this name stands for all domains together.
IDS_FIELDS = ("ids", "input_ids")
TEXT_FIELDS = ("text", "content")
CHAT_FIELDS = ("messages", "conversations", "conversation")
FIELDS = (*IDS_FIELDS, *TEXT_FIELDS, *CHAT_FIELDS)
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""The role of each speaker that `from` of a ShareGPT record names."""

Message = dict[str, Any]
Encode = Callable[[str], Sequence[int]]
Chat = Callable[[list[Message]], str]


@dataclass(frozen=True, slots=True)
class Content:
    """The content of one record of a file.

    Attributes:
        value: a text, token ids (int64 [n]), or the messages of a chat.
        domain: the kind of text.
    """

    value: str | np.ndarray | list[Message]
    domain: str

    @property
    def key(self) -> str:
        """The digest of the content; "" if it is empty."""
        if isinstance(self.value, np.ndarray):
            return ids_digest(self.value)
        return text_digest(plain_text(self.value))


def plain_text(value: str | list[Message]) -> str:
    """Return a text, or the words of a chat without its template."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{m['role']}: {_words(m.get('content'))}" for m in value)


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(p["text"]) for p in parts if isinstance(p, dict) and "text" in p)


def content_of(row: Any, where: str, domain: str, vocabulary: int) -> Content:
    """Return the content of a record.

    Args:
        row: the record; ids come before text, and text before a chat.
        where: the place of the record, for messages.
        domain: the domain of records that name none.
        vocabulary: ids must lie in 0..vocabulary-1.

    Raises:
        ValueError: it has none of `FIELDS`, or what it has is no such thing.
    """
    fields = row if isinstance(row, Mapping) else {}
    label = checked_domain(fields.get("domain", domain), where)
    for name in IDS_FIELDS:
        if isinstance(fields.get(name), (list, np.ndarray)):
            return Content(checked_ids(fields[name], vocabulary, where), label)
    for name in TEXT_FIELDS:
        if isinstance(fields.get(name), str):
            return Content(checked_text(fields[name], where), label)
    for name in CHAT_FIELDS:
        if isinstance(fields.get(name), list):
            return Content(checked_messages(fields[name], where, name), label)
    raise ValueError(
        f"{where}: has neither a text field ({' or '.join(TEXT_FIELDS)}, a string) nor an ids "
        f"field (a list of token ids) nor a chat ({' or '.join(CHAT_FIELDS)}, a list)"
        f"{_its_fields(fields)}."
    )


def _its_fields(fields: Mapping[Any, Any]) -> str:
    names = ", ".join(f"{name!s:.40}" for name in list(fields)[:8])
    return f"; its fields are {names}" if names else ""


def checked_domain(label: Any, where: str) -> str:
    """Return a domain.

    Raises:
        ValueError: it is no name, or the name for all domains, or cannot be printed in one line.
    """
    if isinstance(label, str) and not label.isprintable():
        raise ValueError(f"{where}: the domain {label!r:.60} has control characters.")
    if not isinstance(label, str) or label in ("", ALL):
        raise ValueError(
            f"{where}: the domain is {label!r:.60}, but it must be a name other than {ALL!r}, "
            "which stands for all domains together in results."
        )
    return label


def checked_text(text: str, where: str) -> str:
    """Return a text; raise ValueError if it has half a character of UTF-16."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: is not UTF-8 text (it has one half of a pair that writes a character in "
            "UTF-16)."
        ) from None
    return text


def checked_ids(ids: Any, vocabulary: int, where: str) -> np.ndarray:
    """Return token ids, int64 [n].

    Raises:
        ValueError: they are not one list of whole numbers, or lie outside the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # numpy refuses a ragged list.
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{where}: token ids must be one list of whole numbers.")
    array = array.astype(np.int64)
    outside = array[(array < 0) | (array >= vocabulary)]
    if outside.size:
        raise ValueError(
            f"{where}: token id {outside[0]} is outside the model's vocabulary of {vocabulary}."
        )
    return array


def checked_messages(messages: list[Any], where: str, field: str) -> list[Message]:
    """Return the messages of a chat with `role` and `content`; ShareGPT says `from` and `value`.

    Raises:
        ValueError: one of them is no message, or has a speaker that is not known.
    """
    result = []
    for i, m in enumerate(messages):
        if isinstance(m, Mapping) and "role" not in m and isinstance(m.get("from"), str):
            role = SPEAKERS.get(m["from"].lower())
            if role is None:
                raise ValueError(
                    f"{where}: message {i} of {field} is from {m['from']!r:.60}; known are "
                    f"{', '.join(SPEAKERS)}."
                )
            m = {"role": role, "content": m.get("value")}
        given = isinstance(m, Mapping) and (
            isinstance(m.get("content"), (str, list)) or m.get("tool_calls") is not None
        )
        if not given or not isinstance(m.get("role"), str):
            raise ValueError(
                f"{where}: message {i} of {field} must have a role and a content, or from and "
                "value."
            )
        message = {k: v for k, v in m.items() if v is not None}
        for value in (message["role"], _words(message.get("content"))):
            checked_text(value, where)
        result.append(message)
    return result


def render(value: str | list[Message], chat: Chat | None, where: str) -> str:
    """Return the text that a model reads: a text itself, or a chat through a template.

    Raises:
        ValueError: a chat without a template, or that the template refuses.
    """
    if isinstance(value, str):
        return value
    if chat is None:
        raise ValueError(
            f"{where}: is a chat, which needs the chat template of the model's tokenizer, and none "
            "is given here; give it as text."
        )
    try:
        return chat(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
