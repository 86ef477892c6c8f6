"""What answers look like, for the document: members that clients may count on. There may be more of them."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(Struct):
    role: Literal["assistant"]
    content: str | None


class ChatChoice(Struct):
    index: int
    message: AnswerMessage
    finish_reason: str


class ChatCompletion(Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(Struct):
    index: int
    text: str
    finish_reason: str


class TextCompletion(Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class ModelObject(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: str
    meta: dict[str, Any] | None


class ModelObjects(Struct):
    object: Literal["list"]
    data: list[ModelObject]


class AnthropicUsage(Struct):
    input_tokens: int
    output_tokens: int


class AnthropicAnswer(Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(Struct):
    input_tokens: int


class OllamaAnswer(Struct):
    model: str
    created_at: str
    done: bool
    done_reason: str


class OllamaModels(Struct):
    models: list[dict[str, Any]]


class Status(Struct):
    status: str


class VersionObject(Struct):
    version: str


class Tokens(Struct):
    tokens: list[Any]
    count: int
    max_model_len: int


class TokensText(Struct):
    content: str
    prompt: str


class PromptText(Struct):
    prompt: str


class ResponseObject(Struct):
    id: str
    object: Literal["response"]
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    usage: dict[str, Any] | None


class ResponseTokens(Struct):
    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedObject(Struct):
    id: str
    object: str
    deleted: bool


class ListPage(Struct):
    object: Literal["list"]
    data: list[dict[str, Any]]
    has_more: bool


class VectorUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingObject(Struct):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingObjects(Struct):
    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: VectorUsage


class VectorsOfText(Struct):
    index: int
    embedding: list[Any]


class Reranked(Struct):
    id: str
    model: str
    results: list[dict[str, Any]]
    usage: VectorUsage


class ScoreObject(Struct):
    index: int
    object: Literal["score"]
    score: float


class ScoreObjects(Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreObject]
    usage: VectorUsage


class OllamaVectors(Struct):
    embeddings: list[list[float]]
    model: str
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaVector(Struct):
    embedding: list[float]


class FileObject(Struct):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str


class BatchObject(Struct):
    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str
    created_at: int
    request_counts: dict[str, int]
    output_file_id: str | None
    error_file_id: str | None
