"""What a key's name means to the engine: whom a request counts for, and whose prefixes it shares.

`endpoint.generated` applies it to a body before anything is made of it.
"""

from nanovllm.frontend.server.api_keys import ANONYMOUS
from nanovllm.frontend.server.bodies import GenerationBody
from nanovllm.frontend.server.settings import ServerSettings


class Callers:
    """With one key, or none, all requests are one client's, who says himself who his users are."""

    def __init__(self, settings: ServerSettings) -> None:
        self._are_several = len(settings.keys()) > 1
        isolate = settings.isolate_cache
        self._isolate = self._are_several if isolate is None else isolate

    def apply(self, body: GenerationBody, caller: str) -> None:
        """caller: the name of the key. Its holder cannot choose another's tenant or salt."""
        if caller == ANONYMOUS:
            return
        if self._are_several:
            body.user = caller
        if self._isolate:
            body.cache_salt = f"{caller}\n{body.cache_salt or ''}"  # names hold no line ends
