"""Serves a trained model over HTTP, as OpenAI's API does: try http://127.0.0.1:8000/ in a browser.

    python scripts/serve.py --workdir=runs/124m --port=8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "def main(", "max_tokens": 32}'

/v1/completions and /v1/chat/completions (both also streaming), /v1/embeddings, /v1/models, /v1/predict
(outputs other than text: classes, boxes, scores, images), /health, /metrics (Prometheus). If
$BIGMODEL_API_KEY is set, /v1 needs it as a bearer token (several keys with commas between: each has its share
of the queue). Samples differ unless a request has a seed. SIGTERM stops taking requests, finishes those under
way, and exits with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pathlib
import platform
import signal
import sys

import cli

from bigmodel.config import InputError

OTHER_FILES = 64  # open files of the process that are no connections


def main() -> int:
    args = parse()
    try:
        from bigmodel.infer import server
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install -e '.[serve]'") from error
    limits = server.Limits(
        body_bytes=int(args.max_body_mib * 2**20), bodies_bytes=64 * int(args.max_body_mib * 2**20),
        prompt_tokens=args.max_prompt_tokens, output_tokens=args.max_output_tokens, queue=args.queue,
        clients=args.clients, queue_s=args.queue_s, request_s=args.request_s,
        pixels=int(args.max_megapixels * 2**20),
    )  # fmt: skip
    path = pathlib.Path(args.workdir)
    service = server.load(
        path, args.step, name=args.name or path.resolve().name, limits=limits, slots=args.slots,
        cache_dtype=args.cache_dtype,
    )  # fmt: skip
    return _run(service, args)


def parse() -> argparse.Namespace:
    """The flags. Raises InputError for values that cannot be."""
    flags = cli.workdir_parser(__doc__)
    flags.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too")
    flags.add_argument("--port", type=int, default=8000, help="0: any that is free")
    flags.add_argument("--name", help="of the model; default: the workdir's")
    flags.add_argument("--slots", type=int, default=16, help="answers written at once")
    flags.add_argument("--cache_dtype", default="", choices=["", "int8"], help="of keys and values")
    flags.add_argument("--max_prompt_tokens", type=int, default=0, help="0: the model's context")
    flags.add_argument("--max_output_tokens", type=int, default=0, help="0: the model's context")
    flags.add_argument("--drain_s", type=int, default=60, help="after SIGTERM, at most")
    queue = flags.add_argument_group(
        "the queue; a client is an API key, or an address where there is one key"
    )
    queue.add_argument("--queue", type=int, default=256, help="answers of a client that may wait; then 429")
    queue.add_argument("--clients", type=int, default=4, help="clients whose full queues fit; then 429")
    queue.add_argument("--queue_s", type=float, default=120, help="that an answer may wait; then 503")
    queue.add_argument("--request_s", type=float, default=600, help="that a request may take; then 503")
    http = flags.add_argument_group("HTTP")
    http.add_argument("--connections", type=int, default=1024, help="then those that rest longest are closed")
    http.add_argument("--max_header_kib", type=float, default=32, help="then 431")
    http.add_argument("--header_s", type=float, default=10, help="that a header may take; then 408")
    http.add_argument("--max_body_mib", type=float, default=1.0, help="then 413; 64 times that at once")
    http.add_argument("--body_s", type=float, default=30, help="that a body may take; then 408")
    http.add_argument("--write_s", type=float, default=60, help="that a client may read nothing; then cut")
    http.add_argument("--max_megapixels", type=float, default=16, help="of 2**20 pixels, of one picture")
    http.add_argument("--allowed_hosts", default="", help="names in a request's Host: a,b")
    http.add_argument("--proxy", default="", help="address of a proxy whose X-Forwarded-For is believed")
    args, _ = cli.parse_workdir(flags)
    if not 0 <= args.port < 65536:
        raise InputError(f"--port={args.port}: choose 0 to 65535")
    for name in (
        "slots", "max_body_mib", "drain_s", "clients", "queue_s", "request_s", "connections",
        "max_header_kib", "header_s", "body_s", "write_s", "max_megapixels",
    ):  # fmt: skip
        if not 0 < getattr(args, name) < 2**31:
            raise InputError(f"--{name}={getattr(args, name)}: set it above 0")
    for name in ("queue", "max_prompt_tokens", "max_output_tokens"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name}={getattr(args, name)}: set it to 0 or more")
    return args


def _run(service: object, args: argparse.Namespace) -> int:
    import uvicorn

    from bigmodel.infer import connections, server

    names = [name.strip() for name in args.allowed_hosts.split(",") if name.strip()]
    app = server.app(
        service,  # type: ignore[arg-type]
        os.environ.get("BIGMODEL_API_KEY", ""),
        hosts=(*names, platform.node()),
    )
    limits = connections.ConnectionLimits(
        connections=files_for(args.connections), header_bytes=int(args.max_header_kib * 1024),
        body_bytes=int(args.max_body_mib * 2**20), header_s=args.header_s, body_s=args.body_s,
        write_s=args.write_s,
    )  # fmt: skip
    config = uvicorn.Config(
        app, host=args.host, port=args.port, log_level="warning", access_log=False, lifespan="on", ws="none",
        timeout_graceful_shutdown=args.drain_s, http=connections.limited(limits),
        proxy_headers=bool(args.proxy), forwarded_allow_ips=args.proxy,
    )  # fmt: skip
    try:
        socket = config.bind_socket()
    except SystemExit as error:
        raise InputError(f"--port={args.port} on {args.host} cannot be opened; choose another") from error
    http = uvicorn.Server(config)

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, lambda: setattr(http, "should_exit", True))
        watch = loop.create_task(connections.watch(lambda: http.server_state.connections))
        print(f"serving   http://{args.host}:{socket.getsockname()[1]}/", flush=True)
        await http._serve([socket])  # `serve` would take the signals for itself, and end by them
        watch.cancel()

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(listen())
    return 0


def files_for(connections: int) -> int:
    """Raises the process's limit of open files, and returns how many connections it then may have open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            print(f"{soft} open files (ulimit -n) leave {soft - OTHER_FILES} connections", file=sys.stderr)
            return max(soft - OTHER_FILES, 1)
    return connections


if __name__ == "__main__":
    cli.run(main)
