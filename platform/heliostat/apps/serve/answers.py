"""Shapes answers as OpenAI's clients read them: bodies, and the chunks of streams."""

from __future__ import annotations

import base64
import secrets
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from heliostat.apps.serve.asks import UNFINISHED, AnswerPiece, Logprobs

if TYPE_CHECKING:
    from heliostat.apps.search.search import Passage

Body = dict[str, Any]


class AnswerShape:
    """Writes the answer to one request; all its chunks have one id. `version`: of the model that answered."""

    def __init__(self, model: str, version: str, chat: bool) -> None:
        self.chat = chat
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": version,
        }

    def whole(self, pieces: Sequence[AnswerPiece], sources: Sequence[Passage] | None = None) -> Body:
        """Writes an answer that is not streamed; a piece is the whole answer to one of the prompts."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(index, piece, "message") for index, piece in enumerate(pieces)]
        return {**self.head, "object": kind, "choices": choices, "usage": usage(pieces), **_sources(sources)}

    def chunk(self, index: int, piece: AnswerPiece, sources: Sequence[Passage] | None = None) -> Body:
        """Writes a piece of a stream, the first with the sources of the answer, if it has some."""
        return {**self.head, "object": self._streamed, "choices": [self._choice(index, piece, "delta")], **_sources(sources)}

    def counts(self, pieces: Sequence[AnswerPiece]) -> Body:
        """Writes the numbers of tokens, the last chunk of a stream that asks for them."""
        return {**self.head, "object": self._streamed, "choices": [], "usage": usage(pieces)}

    @property
    def _streamed(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _choice(self, index: int, piece: AnswerPiece, name: str) -> Body:
        choice = {"index": index, "finish_reason": piece.get("finish")}
        if not self.chat:
            return {**choice, "text": piece["text"], "logprobs": piece.get("logprobs")}
        return {**choice, name: {"role": "assistant", "content": piece["text"]}, "logprobs": of_chat(piece.get("logprobs"))}


def of_chat(columns: Logprobs | None) -> Body | None:
    """Writes logprobs as chats have them: by token, each with its likeliest, the best first."""
    if columns is None:
        return None
    tops = columns["top_logprobs"] or [{} for _ in columns["tokens"]]
    content = [
        {**_of_token(token, value), "top_logprobs": [_of_token(*one) for one in sorted(best.items(), key=lambda pair: -pair[1])]}
        for token, value, best in zip(columns["tokens"], columns["token_logprobs"], tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def _of_token(token: str, value: float) -> Body:
    """Describes a token; its bytes are not known where it is a piece of a character."""
    return {"token": token, "logprob": value, "bytes": None if UNFINISHED in token else list(token.encode())}


def usage(pieces: Sequence[AnswerPiece]) -> dict[str, int]:
    """Adds up the tokens of prompts and answers."""
    prompt = sum(piece.get("prompt_tokens", 0) for piece in pieces)
    written = sum(piece.get("completion_tokens", 0) for piece in pieces)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def embeddings(model: str, rows: Sequence[dict[str, Any]], encoding: str) -> Body:
    """Writes embeddings, as numbers or as base64 of little-endian float32."""
    data = [{"object": "embedding", "index": i, "embedding": _encoded(one["embedding"], encoding)} for i, one in enumerate(rows)]
    tokens = sum(one["tokens"] for one in rows)
    return {"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _encoded(vector: Sequence[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def images(model: str, version: str, drawn: Sequence[Body]) -> Body:
    """Writes pictures, each with its seed."""
    head = {"created": int(time.time()), "model": model, "system_fingerprint": version, "output_format": "png"}
    return {**head, "data": list(drawn)}


def passages(index: str, version: str, sources: Sequence[Passage]) -> Body:
    """Writes the passages that were found, the best first."""
    return {"object": "list", "model": index, "system_fingerprint": version, "data": list(sources)}


def models(names: Sequence[str], since: int) -> Body:
    """Lists what is served."""
    return {"object": "list", "data": [model(name, since) for name in names]}


def model(name: str, since: int) -> Body:
    """Describes a model, or an index, that is served."""
    return {"id": name, "object": "model", "created": since, "owned_by": "heliostat"}


def _sources(sources: Sequence[Passage] | None) -> Body:
    return {} if sources is None else {"sources": list(sources)}
