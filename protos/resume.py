"""What has arrived of a stream, and the request that gets the rest of it.

Messages in, messages out, each thing they say once: what a router says again after a resume is left
out. Sends nothing itself.
"""

from __future__ import annotations

from protos.ids import new_request_id
from protos.v1 import generation_pb2


class Received:
    """One generation, over all the streams that it takes.

    Args:
        request: The caller's; it is not changed. One without an id gets one, so that it can be
            asked for again.
    """

    def __init__(self, request: generation_pb2.GenerateRequest) -> None:
        self._request = generation_pb2.GenerateRequest()
        self._request.CopyFrom(request)
        self._has_own_id = bool(request.request_id)
        self._sequence = request.resume_from
        self._token_ids = list(request.resume_tokens.ids)
        self._prompt_digest = request.resume_prompt_digest
        self._prompt_done = 0
        output = self._request.output
        self._shows_ids = not output.HasField("return_token_ids") or output.return_token_ids
        if not self._has_own_id:
            self._request.request_id = new_request_id()
        if self.can_resume:
            output.return_token_ids = True

    @property
    def can_resume(self) -> bool:
        """Whether the stream can go on where it broke; several sequences cannot."""
        return self._request.sampling.n <= 1

    def first(self) -> generation_pb2.GenerateRequest:
        """Return the request to send."""
        return self._request

    def again(self) -> generation_pb2.GenerateRequest:
        """Return the request to send after a failure."""
        request = self._request
        if not self.can_resume:
            if not self._has_own_id:
                request.request_id = new_request_id()  # the one before may still run
            return request
        request.resume_from = self._sequence
        request.resume_prompt_digest = self._prompt_digest
        request.ClearField("resume_tokens")
        if not request.session_id or len(self._token_ids) == self._sequence - 1:
            request.resume_tokens.ids.extend(self._token_ids)
        return request

    def take(
        self, message: generation_pb2.GenerateResponse
    ) -> generation_pb2.GenerateResponse | None:
        """Note a message; return it for the caller, or None where it says nothing new."""
        if not self.can_resume:
            return message
        if message.sequence <= self._sequence:
            return None
        self._sequence = message.sequence
        self._token_ids += message.token_ids
        if message.HasField("accepted"):
            self._request.sampling.seed = message.accepted.seed
            self._prompt_digest = message.accepted.prompt_digest
        if message.HasField("prefill"):
            if message.prefill.tokens_done <= self._prompt_done:
                message.ClearField("prefill")
            self._prompt_done = max(self._prompt_done, message.prefill.tokens_done)
        if not self._shows_ids:
            message.ClearField("token_ids")
        return message if _says_something(message) else None


def _says_something(message: generation_pb2.GenerateResponse) -> bool:
    fields = {descriptor.name for descriptor, _ in message.ListFields()}
    return bool(fields - {"sequence", "index"})
