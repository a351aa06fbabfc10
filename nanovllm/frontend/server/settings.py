"""What an operator can set about the server: flags of `nanovllm serve` are derived from it.

Frozen; passed as JSON to the processes of `--frontends`.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nanovllm.watch.events import EngineView

ToolCallFormat = Literal["auto", "hermes", "llama3_json", "mistral", "none"]
ReasoningFormat = Literal["auto", "think", "deepseek_r1", "none"]
EngineViewSetting = Literal["auto", "full", "counts", "off"]
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the HTTP side; the engine's own are in `EngineConfig`."""

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="0: any free one")] = 8000
    frontends: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None,
        Meta(
            description="HTTP processes on one core; by default 1, or with a GPU "
            "one per 4 processors, at most 4",
        ),
    ] = None
    connect: Annotated[str | None, Meta(description="serve the core that runs at this address")] = (
        None
    )
    api_key: Annotated[
        list[str], Meta(description="clients must send this key; may be given repeatedly")
    ] = []
    allowed_origins: Annotated[
        list[str],
        Meta(description="origin of web pages that may call (CORS); * is any; repeatable"),
    ] = []
    allowed_hosts: Annotated[
        list[str],
        Meta(
            description="names by which clients may call the server, besides localhost, where it "
            "listens there alone; * is any; repeatable"
        ),
    ] = []
    root_path: Annotated[
        str,
        Meta(
            pattern=r"^(/[\w.~-]+)*$",
            description="prefix under which a proxy shows the server, such as /llm; whether the "
            "proxy cuts it off does not matter",
        ),
    ] = ""
    trusted_proxies: Annotated[
        list[str],
        Meta(
            description="addresses or networks of proxies whose X-Forwarded-… headers are believed;"
            " repeatable"
        ),
    ] = []
    tool_call_parser: Annotated[
        ToolCallFormat, Meta(description="how the model writes tool calls; auto: by its template")
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningFormat, Meta(description="how the model marks reasoning; auto: by its template")
    ] = "auto"
    max_body_bytes: Annotated[int, Meta(ge=1024, description="largest request body")] = 16 << 20
    max_requests: Annotated[
        int, Meta(ge=1, description="requests under way per HTTP process; more are answered 429")
    ] = 4096
    max_connections: Annotated[
        int, Meta(ge=1, description="connections per HTTP process; more are answered 503")
    ] = 4096
    shutdown_timeout: Annotated[
        float, Meta(ge=0, description="seconds for running requests to finish after SIGTERM")
    ] = 30.0
    otlp_traces_endpoint: Annotated[
        str | None, Meta(description="send OpenTelemetry spans of requests to this collector")
    ] = None
    engine_view: Annotated[
        EngineViewSetting,
        Meta(
            description="what /v1/engine shows: all, also what is in blocks (others' prompts), "
            "counts alone, or nothing; auto: full if only this machine can ask, and needs no key"
        ),
    ] = "auto"
    access_log: Annotated[bool, Meta(description="log every HTTP request")] = False

    @property
    def shown_view(self) -> EngineView | None:
        """What `engine_view` comes to; None is nothing."""
        if self.engine_view == "off":
            return None
        if self.engine_view == "auto":
            return "full" if self.host in LOOPBACK and not self.api_key else "counts"
        return self.engine_view
