"""Puts load on two servers in other processes: one batches, one serves requests one after another.

    python scripts/bench/bench_serve.py --workdir=runs/small                   # 64 clients, 2,000 requests
    python scripts/bench/bench_serve.py --workdir=runs/small --requests=200 --clients=16

Starts scripts/serve.py on loopback twice, with --slots slots and with a single one. Both get the same
requests from the same number of clients, each of which asks again when it is answered: so the single slot
never waits for the network. In turns, --rounds of each. Prints errors, lost and wrong answers (each is
compared with the offline one at temperature 0), p50 and p99 of a request's time, tokens a second, and the
ratio of the two. Exit code 1 if an answer was wrong, or lost, or an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bigmodel.config import InputError

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # scripts/
import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = 50  # different ones; their answers are written offline first
ALONE = "one at a time"


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument("--workdir", required=True, help="a language model's run")
    flags.add_argument("--requests", type=int, default=2000)
    flags.add_argument("--clients", type=int, default=64)
    flags.add_argument("--alone", type=int, default=0, help="requests to the single slot; 0: a fifth")
    flags.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    flags.add_argument("--slots", type=int, default=64)
    flags.add_argument("--rounds", type=int, default=2)
    flags.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    args, _ = cli.parse(flags)
    for key in ("requests", "clients", "tokens", "slots", "rounds"):
        if getattr(args, key) < 1:
            raise InputError(f"--{key}={getattr(args, key)}: set it to 1 or more")
    expected = offline(args.workdir, args.tokens)
    counts = {"batched": args.requests, ALONE: args.alone or max(args.requests // 5, 1)}
    tallies = {name: Tally() for name in counts}
    with served(args.workdir, args.slots) as batched, served(args.workdir, 1) as alone:
        for part in range(args.rounds):
            for name, url in (("batched", batched), (ALONE, alone)):
                share = counts[name] * (part + 1) // args.rounds - counts[name] * part // args.rounds
                asyncio.run(load(url, args.clients, share, args.tokens, expected, tallies[name]))
    results: dict[str, Any] = {name: tally.summary() for name, tally in tallies.items()}
    for name, result in results.items():
        print(
            "{:<14} {requests} requests, {errors} errors, {lost} lost, {wrong} wrong; p50 {p50_s:.3f} s, p99 "
            "{p99_s:.3f} s, {tokens_per_s:.0f} tokens/s".format(name, **result)
        )
    ratio = results["batched"]["tokens_per_s"] / results[ALONE]["tokens_per_s"]
    print(f"batched / {ALONE}: {ratio:.2f}, {args.clients} clients each")
    if args.json:
        args.json.write_text(
            json.dumps({**results, "clients": args.clients, "ratio": ratio}, indent=2) + "\n"
        )
    return int(any(results[name][bad] for name in counts for bad in ("errors", "lost", "wrong")))


def offline(workdir: str, tokens: int) -> dict[str, str]:
    """Every prompt's answer at temperature 0."""
    from bigmodel.infer import decode, generate

    writer = generate.Writer.load(workdir)
    room = decode.context(writer.decoder.program.config) - tokens - 1
    texts = [f"def f{index}(" + "x, " * (index % 7) for index in range(PROMPTS)]
    longest = max(len(writer.encode(text)) for text in texts)
    if longest > room:
        raise InputError(
            f"--tokens={tokens}: prompts of {longest} and answers are more than the model's context"
        )
    return dict(zip(texts, writer.write(texts, tokens), strict=True))


@contextlib.contextmanager
def served(workdir: str, slots: int) -> Iterator[str]:
    """The address of a server that has started; it is stopped in the end."""
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), f"--workdir={workdir}", "--port=0"]
    server = subprocess.Popen(
        [*command, f"--slots={slots}", "--queue=4096"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = server.stdout.readline()  # type: ignore[union-attr]
        if not line.startswith("serving"):
            raise InputError(f"--workdir={workdir}: the server did not start, as it says above")
        yield line.split()[1]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


@dataclass
class Tally:
    """Results of the requests to one server."""

    requests: int = 0
    errors: int = 0
    wrong: int = 0
    tokens: int = 0
    whole_s: float = 0.0
    times: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        times = sorted(self.times) or [float("nan")]
        return {
            "requests": self.requests, "errors": self.errors, "wrong": self.wrong,
            "lost": self.requests - len(self.times) - self.errors, "p50_s": statistics.median(times),
            "p99_s": times[min(int(0.99 * len(times)), len(times) - 1)],
            "tokens_per_s": self.tokens / self.whole_s,
        }  # fmt: skip


async def load(
    url: str, clients: int, count: int, tokens: int, expected: dict[str, str], tally: Tally
) -> None:
    """Each client sends its next request when its last is answered."""
    prompts, todo = list(expected), iter(range(count))

    async def client() -> None:
        connection = await asyncio.open_connection(*_place(url))
        for number in todo:
            prompt = prompts[number % len(prompts)]
            began = time.perf_counter()
            try:
                answer = await post(connection, {"prompt": prompt, "max_tokens": tokens, "temperature": 0})
            except (OSError, ValueError, LookupError, EOFError):
                tally.errors += 1
                connection[1].close()
                connection = await asyncio.open_connection(*_place(url))
                continue
            tally.times.append(time.perf_counter() - began)
            tally.wrong += answer["choices"][0]["text"] != expected[prompt]
            tally.tokens += answer["usage"]["completion_tokens"]
        connection[1].close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    tally.whole_s += time.perf_counter() - began
    tally.requests += count


def _place(url: str) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(url)
    return str(parts.hostname), int(parts.port or 80)


async def post(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], body: Any) -> dict[str, Any]:
    """One request on an open connection. No HTTP library: the load must not take the server's processor.

    Raises OSError, ValueError, LookupError or EOFError for what is no good answer.
    """
    reader, writer = connection
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    said = await reader.readexactly(int(answer.split("content-length:")[1].split()[0]))
    if answer.split()[1] != "200":
        raise ValueError(said.decode())
    return json.loads(said)


if __name__ == "__main__":
    cli.run(main)
