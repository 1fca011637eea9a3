"""MTSERVE_* environment variables as frozen settings: where the model is, what computes, and limits.

No setting changes ids, labels or templates. Device and profile change answers, and only as far as the checkpoint's
manifest accepts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from mtserve.errors import ConfigError


class Settings(BaseSettings):
    """Read from the environment when made; `MTSERVE_MODEL=a,b` serves two checkpoints in one process."""

    model_config = SettingsConfigDict(env_prefix="MTSERVE_", frozen=True, extra="ignore")

    model: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Checkpoints to serve: folders or hub ids, separated by commas, or a JSON list; PREFIX=LOCATION "
        "puts PREFIX. before its tasks' names.",
    )
    max_batch_tokens: int = Field(default=4096, ge=1, description="Most tokens of one trunk pass, padding included.")
    max_past_tokens: int = Field(
        default=32_768, ge=1, description="Most tokens, prompts included, that running generations may keep; more wait."
    )
    max_queue_tokens: int = Field(default=262_144, ge=1, description="Most tokens that wait for a trunk; then 429.")
    cache_mib: int = Field(
        default=0,
        ge=0,
        description="Most MiB of a trunk's outputs that are kept, so that another task on the same text costs its head "
        "alone; 0 keeps none. Requests with Cache-Control: no-store leave nothing there.",
    )
    max_inputs: int = Field(default=1024, ge=1, description="Most inputs of one request.")
    max_body_bytes: int = Field(default=8 * 2**20, ge=1, description="Largest request body; then 413.")
    max_text_chars: int = Field(default=1_000_000, ge=1, description="Longest single string of a request; then 413.")
    timeout_s: float = Field(default=60.0, gt=0, description="Longest time from acceptance to answer; then 504.")

    max_wait_ms: float = Field(
        default=0.0, ge=0, description="How long an idle engine waits for a fuller batch; 0 starts at once."
    )
    weights: Annotated[dict[str, PositiveFloat], NoDecode] = Field(
        default={},
        description="Shares of tasks in the engine's tokens where several compete, as TASK=2,TASK=0.5 or a JSON "
        "object; 1 for all others.",
    )
    grace_s: float = Field(
        default=20.0, ge=0, le=25, description="Longest time that SIGTERM waits for requests that are under way."
    )

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="Keys that requests must have, separated by commas, or a JSON list; sha256:HEX for one."
    )
    api_keys_file: Path | None = Field(default=None, description="A file with one more such key a line; # comments.")
    open_metrics: bool = Field(default=False, description="Whether /metrics needs no key.")
    access_log: bool = Field(default=True, description="Whether each request writes a line of JSON to stdout.")
    log_texts: bool = Field(default=False, description="Whether the access log holds the inputs of requests.")

    admin_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="Keys for /admin, where heads come and go, as MTSERVE_API_KEYS; without, there is none."
    )
    heads: Path | None = Field(
        default=None,
        description="A folder for heads that come to the running server, which a later start finds there; by default "
        "they go with the server.",
    )
    max_head_bytes: int = Field(default=256 * 2**20, ge=1, description="Largest head that may come; then 413.")
    ui: bool = Field(default=False, description="Whether the playground is at /ui; needs the extra `ui`.")

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="What computes; auto is the GPU where there is one."
    )
    profile: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        default="auto",
        description="Precision; auto is the fastest that the checkpoints accept and the hardware has units for.",
    )
    capture: bool = Field(
        default=True,
        description="Whether the trunk's pass is made a graph at start: some seconds, for less overhead in every pass.",
    )
    onnx_providers: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="What computes bundles, by preference and with commas: tensorrt, cuda, openvino, cpu; by default "
        "what the device has.",
    )
    onnx_device_id: int = Field(default=0, ge=0, description="Which GPU computes bundles.")
    onnx_memory_mib: int | None = Field(default=None, ge=1, description="Most of a GPU's memory that a graph takes.")
    onnx_arena: bool = Field(default=True, description="Whether bundles keep freed memory for the next pass.")
    onnx_cuda_graph: bool = Field(default=False, description="Whether a bundle's passes are recorded as CUDA graphs.")
    onnx_io_binding: bool = Field(
        default=True, description="Whether a bundle's states stay on the GPU between trunk and heads."
    )
    workers: int = Field(
        default=1, ge=1, description="Processes that speak HTTP; if several, they share one more, which has the model."
    )
    processes: int = Field(
        default=1, ge=1, description="Servers that share this machine's cores; each takes its part of them."
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of a worker; by default as tuned on equal hardware, else all of its part of the cores.",
    )
    keep_memory: bool | None = Field(
        default=None,
        description="Whether freed memory is kept for the next pass (glibc); by default as tuned, else yes.",
    )

    @field_validator("model", "api_keys", "admin_keys", "onnx_providers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("weights", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str) or value.lstrip().startswith("{"):
            return json.loads(value) if isinstance(value, str) else value
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        return {name.strip(): share.strip() for name, _, share in pairs}


def read_settings() -> Settings:
    """Settings from the environment. Raises ConfigError that names the variable."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "MTSERVE_" + "_".join(map(str, first["loc"][:1])).upper()
        secret = {"api_keys", "admin_keys"} & {*first["loc"]}
        found = "" if secret else f"; found {first.get('input')!r}"
        raise ConfigError(f"{name}: {first['msg']}{found}") from (None if not found else error)
