"""Puts load on a server in another process: many clients at once, every answer compared with the offline one.

    python scripts/bench_serve.py --workdir=runs/gpt                     # 64 clients, 2,000 requests
    python scripts/bench_serve.py --workdir=runs/gpt --requests=200 --clients=16

Starts scripts/serve.py on loopback twice: with --slots slots, and with one slot for one client, one request
at a time. Prints errors, lost and wrong answers, p50 and p99 of a request's time, tokens a second, and the
ratio of the two. Exit code 1 if an answer was wrong, or lost, or an error.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import cli

from bigmodel.config import InputError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPTS = 50  # different ones; their answers are written offline first


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--workdir", required=True, help="a language model's run")
    flags.add_argument("--requests", type=int, default=2000)
    flags.add_argument("--clients", type=int, default=64)
    flags.add_argument("--alone", type=int, default=0, help="requests one at a time; 0: a tenth")
    flags.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    flags.add_argument("--slots", type=int, default=32)
    flags.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    args, _ = cli.parse(flags)
    for key in ("requests", "clients", "tokens", "slots"):
        if getattr(args, key) < 1:
            raise InputError(f"--{key}={getattr(args, key)}: set it to 1 or more")
    expected = offline(args.workdir, args.tokens)
    results = {}
    for name, slots, clients, count in (
        ("batched", args.slots, args.clients, args.requests),
        ("one at a time", 1, 1, args.alone or max(args.requests // 10, 1)),
    ):
        results[name] = measure(args.workdir, slots, clients, count, args.tokens, expected)
        print(
            "{:<14} {requests} requests, {clients} clients: {errors} errors, {lost} lost, {wrong} wrong; p50 "
            "{p50_s:.3f} s, p99 {p99_s:.3f} s, {tokens_per_s:.0f} tokens/s".format(name, **results[name]),
            flush=True,
        )
    ratio = results["batched"]["tokens_per_s"] / results["one at a time"]["tokens_per_s"]
    print(f"batched / one at a time: {ratio:.2f}")
    if args.json:
        args.json.write_text(json.dumps({**results, "ratio": ratio}, indent=2) + "\n")
    return int(any(r["errors"] + r["lost"] + r["wrong"] for r in results.values()))


def offline(workdir: str, tokens: int) -> dict[str, str]:
    """Every prompt's answer at temperature 0."""
    from bigmodel import decoder, infer

    writer = infer.Writer.load(workdir)
    room = decoder.context(writer.decoder.program.config) - tokens - 1
    texts = [f"def f{index}(" + "x, " * (index % 7) for index in range(PROMPTS)]
    longest = max(len(writer.encode(text)) for text in texts)
    if longest > room:
        raise InputError(
            f"--tokens={tokens}: prompts of {longest} and answers are more than the model's context"
        )
    return dict(zip(texts, writer.write(texts, tokens), strict=True))


def measure(
    workdir: str, slots: int, clients: int, count: int, tokens: int, expected: dict[str, str]
) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), f"--workdir={workdir}", "--port=0"]
    server = subprocess.Popen(
        [*command, f"--slots={slots}", "--queue=4096"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = server.stdout.readline()  # type: ignore[union-attr]
        if not line.startswith("serving"):
            raise InputError(f"--workdir={workdir}: the server did not start, as it says above")
        return asyncio.run(load(line.split()[1], clients, count, tokens, expected))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


async def load(url: str, clients: int, count: int, tokens: int, expected: dict[str, str]) -> dict[str, Any]:
    """Each client sends its next request when its last is answered."""
    import httpx

    prompts, todo = list(expected), iter(range(count))
    times: list[float] = []
    errors = wrong = written = 0

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal errors, wrong, written
        for number in todo:
            prompt = prompts[number % len(prompts)]
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
            began = time.perf_counter()
            try:
                response = await http.post(url + "v1/completions", json=body)
                answer = response.raise_for_status().json()
            except (httpx.HTTPError, ValueError):
                errors += 1
                continue
            times.append(time.perf_counter() - began)
            wrong += answer["choices"][0]["text"] != expected[prompt]
            written += answer["usage"]["completion_tokens"]

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        await http.post(url + "v1/completions", json={"prompt": prompts[0], "max_tokens": 2})
        began = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        whole_s = time.perf_counter() - began
    times.sort()
    return {
        "requests": count, "clients": clients, "errors": errors, "wrong": wrong,
        "lost": count - len(times) - errors, "p50_s": statistics.median(times),
        "p99_s": times[min(int(0.99 * len(times)), len(times) - 1)], "tokens_per_s": written / whole_s,
    }  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
