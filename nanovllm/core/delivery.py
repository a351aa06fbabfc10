"""Gets messages to clients over the endpoint, each message encoded once.

`CoreServer` calls it after every step. Nothing blocks: what a client's queue does not take stays
with the `Client`, the oldest part as a finished frame, the rest as outputs still being merged.
"""

import msgspec

from nanovllm.core.clients import Client, select
from nanovllm.core.socket import Endpoint, Sent
from nanovllm.protocol.messages import FromCore, Outputs, RequestFailed


class Delivery:
    """`failures` are (client id, number, cause) of outputs that could not be encoded."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._encoder = msgspec.msgpack.Encoder()
        self.failures: list[tuple[int, int, str]] = []

    def post(self, identity: bytes, message: FromCore) -> Sent:
        """Send, or forget about it: for what a client can do without, and for strangers."""
        return self._endpoint.send(identity, self._encoder.encode(message))

    def deliver(self, client: Client) -> Sent:
        """Send all that waits for a client: outputs first, then answers, each in order."""
        if client.unsent is None and client.has_outputs:
            client.num_unsent = client.num_merged
            client.unsent = self._encode(client, client.take_outputs())
        if client.unsent is not None:
            sent = self._endpoint.send(client.identity, client.unsent)
            if sent != "sent":
                return sent
            client.unsent, client.num_unsent = None, 0
            if client.has_outputs:
                return self.deliver(client)
        while client.answers:
            sent = self.post(client.identity, client.answers[0])
            if sent != "sent":
                return sent
            client.answers.popleft()
        return "sent"

    def _encode(self, client: Client, outputs: Outputs) -> bytes:
        """All of `outputs`, or, if something in them cannot be encoded, all but those requests."""
        try:
            return self._encoder.encode(outputs)
        except Exception:
            return self._encode_good_ones(client, outputs)

    def _encode_good_ones(self, client: Client, outputs: Outputs) -> bytes:
        numbers = {one.number for one in outputs.started + outputs.prompt_logprobs}
        numbers |= {*outputs.numbers, *(one.number for one in outputs.finished)}
        for number in sorted(numbers):
            try:
                self._encoder.encode(select(outputs, {number}))
            except Exception as error:
                numbers.remove(number)
                cause = f"its output cannot be encoded: {type(error).__name__}: {error}"
                client.answers.append(RequestFailed(number, cause))
                self.failures.append((client.client_id, number, cause))
        return self._encoder.encode(select(outputs, numbers))
