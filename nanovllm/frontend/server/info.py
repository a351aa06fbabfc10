"""The small endpoints: models, tokenizing, version, health and metrics."""

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from nanovllm import __version__
from nanovllm.frontend.server.api_errors import refused
from nanovllm.frontend.server.bodies import DetokenizeBody, TokenizeBody, blaming
from nanovllm.frontend.server.endpoint import JsonAnswer, read, serving_of
from nanovllm.frontend.server.prompts import aside_if_long, chat_prompt, encoded
from nanovllm.frontend.server.replies import ApiRoot, ModelCard, ModelList, Text, Tokens, Version
from nanovllm.frontend.server.serving import Serving
from nanovllm.frontend.tokenizer import Tokenizer

ALIVE = ("ready", "draining")


async def describe_api(request: Request) -> Response:
    """What this is: the base URL of clients, and where people look."""
    return JsonAnswer(
        ApiRoot(
            "nanovllm: OpenAI's API is served below this URL; people look at `page`",
            page="../",
            docs="../docs",
            openapi="../openapi.json",
            models="v1/models",
            chat="v1/chat/completions",
        )
    )


async def list_models(request: Request) -> Response:
    """The one model that is served, by each of its names."""
    serving = serving_of(request)
    return JsonAnswer(ModelList([_card(serving, name) for name in serving.model_names]))


async def show_model(request: Request) -> Response:
    """Facts of the served model."""
    serving = serving_of(request)
    name = request.path_params["model"]
    serving.check_model(name)
    return JsonAnswer(_card(serving, name if name in serving.model_names else serving.model_name))


async def tokenize(request: Request) -> Response:
    """A prompt's token ids, or those of the prompt that the chat template makes of messages."""
    serving = serving_of(request)
    body = await read(request, TokenizeBody)
    serving.check_model(body.model)
    tokenizer = _tokenizer(serving)
    if (body.prompt is None) == (body.messages is None):
        raise refused("prompt", "give exactly one of prompt and messages")
    with blaming(body):
        if body.prompt is None:
            token_ids = (await chat_prompt(tokenizer, body)).token_ids
        else:
            add = body.add_special_tokens is not False
            token_ids = await encoded(tokenizer, body.prompt, add_special_tokens=add)
    limit = serving.llm.info.worker.max_model_len

    def answer() -> Response:
        texts = [tokenizer.token_text(i) for i in token_ids] if body.return_token_strs else None
        return JsonAnswer(Tokens(len(token_ids), limit, token_ids, texts))

    return await aside_if_long(answer, len(token_ids))


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    serving = serving_of(request)
    body = await read(request, DetokenizeBody)
    serving.check_model(body.model)
    lowest, highest = min(body.tokens, default=0), max(body.tokens, default=0)
    if lowest < 0 or highest >= serving.llm.vocab_size:
        odd = lowest if lowest < 0 else highest
        raise refused("tokens", f"{odd} is not in [0, {serving.llm.vocab_size})")
    tokenizer = _tokenizer(serving)

    def answer() -> Response:
        return JsonAnswer(Text(tokenizer.decode(body.tokens, skip_special_tokens=False)))

    return await aside_if_long(answer, len(body.tokens))


async def show_version(request: Request) -> Response:
    """Of nanovllm."""
    return JsonAnswer(Version(__version__))


async def health(request: Request) -> Response:
    """200 while the core shows progress, however busy; 503 while it loads, stalls or is gone."""
    found = serving_of(request).health()
    return JsonAnswer(found, 200 if found.status in ALIVE else 503)


async def ready(request: Request) -> Response:
    """200 if new requests are welcome: also not while the server drains."""
    found = serving_of(request).health()
    return JsonAnswer(found, 200 if found.status == "ready" else 503)


async def metrics(request: Request) -> Response:
    """Prometheus's text format."""
    return Response(serving_of(request).metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def _card(serving: Serving, name: str) -> ModelCard:
    info = serving.llm.info
    return ModelCard(
        name,
        serving.created,
        root=info.model,
        max_model_len=info.worker.max_model_len,
        default_sampling_params=info.worker.sampling_defaults,
    )


def _tokenizer(serving: Serving) -> Tokenizer:
    tokenizer = serving.llm.tokenizer
    if tokenizer is None:
        raise refused("model", "has no tokenizer here")
    return tokenizer
