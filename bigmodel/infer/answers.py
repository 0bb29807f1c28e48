"""Answers in the shape of OpenAI's API: completions and chats, entire or as server-sent events."""

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
from bigmodel.infer.logprobs import Scored
from bigmodel.infer.openai_api import Ask, Refusal
from bigmodel.infer.service import Service
from bigmodel.infer.worker import Text

T = TypeVar("T")


async def respond(service: Service, request: Request, ask: Ask, kind: str, client: str) -> Response:
    """`kind`: text_completion or chat.completion. Raises Refusal or ClientDisconnect."""
    plans = service.plan(ask, client)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    reply = _Reply(service, ask, plans, kind, head, client)
    if ask.stream:
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(reply.events(), media_type="text/event-stream", headers=headers)
    return JSONResponse(await unless_gone(request, reply.entire()))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. It is cancelled if the client leaves: raises ClientDisconnect."""
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
    ask: Ask
    plans: Sequence[engine.Request]
    kind: str
    head: dict[str, Any]
    client: str

    @property
    def prompt_tokens(self) -> int:
        return sum(len(plan.prompt) for plan in self.plans[:: self.ask.n])

    async def entire(self) -> dict[str, Any]:
        texts, reasons, count = [""] * len(self.plans), [""] * len(self.plans), 0
        written: dict[int, Text] = {}
        running = self.service.answers(self.ask, self.plans, self.client)
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
        """Server-sent events, as OpenAI's: a chunk for every piece of text, and [DONE].

        With log-probabilities, which are known at an answer's end, each answer is one piece.
        """
        chat = self.kind == "chat.completion"
        head = {**self.head, "object": f"{self.kind}.chunk" if chat else self.kind}
        waiting = {index: self._echoed(index) for index in range(len(self.plans))}
        started: set[int] = set()
        count = 0
        try:
            running = self.service.answers(self.ask, self.plans, self.client)
            async with contextlib.aclosing(running) as pieces:
                async for index, new, reason, text in pieces:
                    count += len(text.ids) if reason else 0
                    waiting[index] += new
                    if self.ask.logprobs is not None and not reason:
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
        if self.ask.include_usage:
            yield _event({**head, "choices": [], "usage": _usage(self.prompt_tokens, count)})
        yield "data: [DONE]\n\n"

    def _hidden(self, index: int) -> int:
        """How many of a prompt's first ids are none of its text's, such as the separator before it."""
        assert self.service.writer is not None
        if not isinstance(self.ask.prompts[index // self.ask.n], str):
            return 0
        pairs = zip(self.service.writer.encode("").tolist(), self.plans[index].prompt, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _echoed(self, index: int) -> str:
        assert self.service.writer is not None
        prompt = self.ask.prompts[index // self.ask.n]
        if not self.ask.echo:
            return ""
        return prompt if isinstance(prompt, str) else self.service.writer.tokenizer.decode(list(prompt))

    async def _scores(self, index: int, text: Text) -> dict[str, Any] | None:
        """The choice's `logprobs`, if it is to have any."""
        if self.ask.logprobs is None:
            return None
        writer, prompt = self.service.writer, list(self.plans[index].prompt)
        assert writer is not None
        ids = prompt + text.ids
        echoed = len(self._echoed(index))
        scored = Scored(
            ids, first=self._hidden(index) if self.ask.echo else len(prompt),
            most_chars=echoed + text.length if text.cut else None,
            scores=await self.service.scores(ids) if len(ids) > 1 else None, top=self.ask.logprobs,
            tokenizer=writer.tokenizer, null_first=self.ask.echo and self._hidden(index) < len(prompt),
        )  # fmt: skip
        return scored.completion() if self.kind == "text_completion" else scored.chat(writer.decoder.ends)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def _message(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
