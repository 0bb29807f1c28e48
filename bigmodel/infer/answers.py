"""Responses in the format of OpenAI's API: completions and chats, at once or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from bigmodel.infer import engine
from bigmodel.infer.detokenize import Detokenizer
from bigmodel.infer.logprobs import Scored
from bigmodel.infer.openai_api import Completion, Refusal
from bigmodel.infer.service import Service

T = TypeVar("T")


async def respond(
    service: Service, request: Request, completion: Completion, kind: str, client: str
) -> Response:
    """Answers a request. `kind` is text_completion or chat.completion. Raises Refusal or ClientDisconnect."""
    requests = service.engine_requests(completion, client)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    reply = _Reply(service, completion, requests, kind, head, client)
    if completion.stream:
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(reply.events(), media_type="text/event-stream", headers=headers)
    return JSONResponse(await unless_gone(request, reply.entire()))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the work's result. Cancels it and raises ClientDisconnect if the client leaves."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        left.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class _Reply:
    service: Service
    completion: Completion
    requests: Sequence[engine.Request]
    kind: str
    head: dict[str, Any]
    client: str

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests[:: self.completion.n])

    async def entire(self) -> dict[str, Any]:
        texts, reasons, count = [""] * len(self.requests), [""] * len(self.requests), 0
        written: dict[int, Detokenizer] = {}
        running = self.service.answers(self.completion, self.requests, self.client)
        async with contextlib.aclosing(running) as pieces:
            async for index, new, reason, text in pieces:
                texts[index] += new
                if reason:
                    reasons[index], written[index], count = reason, text, count + len(text.ids)
        choices: list[dict[str, Any]] = []
        for index, (said, why) in enumerate(zip(texts, reasons, strict=True)):
            said = self._echoed(index) + said
            body = {"text": said} if self.kind == "text_completion" else {"message": _message(said)}
            scores = await self._scores(index, written[index])
            choices.append({"index": index, **body, "logprobs": scores, "finish_reason": why})
        usage = _usage(self.prompt_tokens, count)
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage}

    async def events(self) -> AsyncIterator[str]:
        """Yields server-sent events in OpenAI's format: a chunk for every piece of text, then [DONE].

        With log-probabilities, which are computed at an answer's end, each answer is one chunk.
        """
        chat = self.kind == "chat.completion"
        head = {**self.head, "object": f"{self.kind}.chunk" if chat else self.kind}
        waiting = {index: self._echoed(index) for index in range(len(self.requests))}
        started: set[int] = set()
        count = 0
        try:
            running = self.service.answers(self.completion, self.requests, self.client)
            async with contextlib.aclosing(running) as pieces:
                async for index, new, reason, text in pieces:
                    count += len(text.ids) if reason else 0
                    waiting[index] += new
                    if self.completion.logprobs is not None and not reason:
                        continue
                    new, waiting[index] = waiting[index], ""
                    scores = await self._scores(index, text) if reason else None
                    said: dict[str, Any] = {"text": new}
                    if chat:
                        said = {"delta": _message(new) if index not in started else {"content": new}}
                        started.add(index)
                    choice = {"index": index, **said, "logprobs": scores, "finish_reason": reason}
                    yield _event({**head, "choices": [choice]})
        except Refusal as refusal:
            yield _event(refusal.body())
        if self.completion.include_usage:
            yield _event({**head, "choices": [], "usage": _usage(self.prompt_tokens, count)})
        yield "data: [DONE]\n\n"

    def _hidden(self, index: int) -> int:
        """Counts the ids that stand before a prompt's text, such as a separator."""
        assert self.service.writer is not None
        if not isinstance(self.completion.prompts[index // self.completion.n], str):
            return 0
        pairs = zip(self.service.writer.encode("").tolist(), self.requests[index].prompt, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _echoed(self, index: int) -> str:
        assert self.service.writer is not None
        prompt = self.completion.prompts[index // self.completion.n]
        if not self.completion.echo:
            return ""
        return prompt if isinstance(prompt, str) else self.service.writer.tokenizer.decode(list(prompt))

    async def _scores(self, index: int, text: Detokenizer) -> dict[str, Any] | None:
        """The choice's `logprobs`; None unless the request wants them."""
        if self.completion.logprobs is None:
            return None
        writer, prompt = self.service.writer, list(self.requests[index].prompt)
        assert writer is not None
        ids = prompt + text.ids
        echoed = len(self._echoed(index))
        scored = Scored(
            ids, first=self._hidden(index) if self.completion.echo else len(prompt),
            most_chars=echoed + text.length if text.cut else None,
            scores=await self.service.scores(ids) if len(ids) > 1 else None, top=self.completion.logprobs,
            tokenizer=writer.tokenizer, null_first=self.completion.echo and self._hidden(index) < len(prompt),
        )  # fmt: skip
        return scored.completion() if self.kind == "text_completion" else scored.chat(writer.decoder.ends)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def _message(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
