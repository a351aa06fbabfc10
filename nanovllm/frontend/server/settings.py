"""What an operator can set about the server: flags of `nanovllm serve` are derived from it.

Frozen; passed as JSON to the processes of `--frontends`.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nanovllm.frontend.server.api_keys import ApiKey, read_keys
from nanovllm.watch.events import EngineView

ToolCallFormat = Literal["auto", "hermes", "llama3_json", "mistral", "none"]
ReasoningFormat = Literal["auto", "think", "deepseek_r1", "none"]
EngineViewSetting = Literal["auto", "full", "counts", "off"]
PageSetting = Literal["all", "counts", "off"]
OLDER_NAMES: dict[EngineViewSetting, PageSetting | None] = {
    "auto": None,
    "full": "all",
    "counts": "counts",
    "off": "off",
}
Preset = Literal["classroom"]
# Fields of `EngineConfig`: so small that a few requests wait, share, are cut and are preempted.
PRESETS: dict[Preset, dict[str, int | bool]] = {
    "classroom": {
        "num_gpu_blocks_override": 64,
        "max_model_len": 768,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "mixed_prefill_tokens": 32,
        "allow_debug": True,
    }
}
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
    connect_keys: Annotated[
        str | None, Meta(description="file of this client's keys, if the core at --connect has any")
    ] = None
    api_key: Annotated[
        list[str],
        Meta(
            description="clients must send this key; repeatable. It shows in the list of processes:"
            " NANOVLLM_API_KEY and --api-key-file do not"
        ),
    ] = []
    api_key_file: Annotated[
        str | None, Meta(description="file of mode 600 with a line `name key` for each client")
    ] = None
    isolate_cache: Annotated[
        bool | None,
        Meta(
            description="share cached prefixes only among requests of one key, so that none learns "
            "from timing what another has sent; by default if there are several keys"
        ),
    ] = None
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
    chat_template: Annotated[
        str | None, Meta(description="file of a Jinja chat template, instead of the model's own")
    ] = None
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
    preset: Annotated[
        Preset | None,
        Meta(
            description="classroom: a small cache, few seats, a small budget of tokens and "
            "--allow-debug, so that the page shows what an engine does; flags given count more"
        ),
    ] = None
    open: Annotated[bool, Meta(description="open the page in a browser when ready")] = False
    page: Annotated[
        PageSetting | None,
        Meta(
            description="what the page and /v1/engine show: all, also what is in blocks (others' "
            "prompts), counts alone, or nothing; all is for a server that only this machine can "
            "ask, without keys, and the default there; elsewhere it is counts"
        ),
    ] = None
    engine_view: Annotated[
        EngineViewSetting, Meta(description="older name of --page, where full is all")
    ] = "auto"
    access_log: Annotated[bool, Meta(description="log every HTTP request")] = False

    @property
    def shown_view(self) -> EngineView | None:
        """What `page` comes to; None is nothing."""
        wanted = self.page or OLDER_NAMES[self.engine_view]
        if wanted == "off":
            return None
        return "full" if wanted != "counts" and self.may_show_all else "counts"

    @property
    def may_show_all(self) -> bool:
        """Whether nobody's words are shown to anybody else: one user, on this machine."""
        return self.host in LOOPBACK and not self.has_keys

    @property
    def has_keys(self) -> bool:
        return bool(self.api_key) or self.api_key_file is not None

    def keys(self) -> list[ApiKey]:
        """Those of the file, and those given bare, by number. Raises `ValueError`: the file."""
        bare = [ApiKey(f"key-{number}", key) for number, key in enumerate(self.api_key, 1)]
        return bare + ([] if self.api_key_file is None else read_keys(Path(self.api_key_file)))
