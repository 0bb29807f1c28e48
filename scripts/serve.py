"""Serves a trained model over HTTP, as OpenAI's API does: try http://127.0.0.1:8000/ in a browser.

    python scripts/serve.py --workdir=runs/124m --port=8000
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def main(", "max_tokens": 32}'

/v1/completions, /v1/chat/completions (both streaming too), /v1/embeddings, /v1/models, /v1/predict (what is
no text: classes, boxes, scores, images), /health, /metrics (Prometheus). With $BIGMODEL_API_KEY set, /v1 asks
for it as a bearer token. SIGTERM stops taking requests, finishes those under way, and exits with 0.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal

import cli

from bigmodel.config import InputError


def main() -> int:
    flags = cli.parser(__doc__)
    flags.add_argument(
        "--workdir", required=True, type=cli.directory, help="a run that scripts/train.py made"
    )
    flags.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    flags.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too")
    flags.add_argument("--port", type=int, default=8000, help="0: any that is free")
    flags.add_argument("--name", help="of the model; default: the workdir's")
    flags.add_argument("--slots", type=int, default=16, help="answers written at once")
    flags.add_argument("--queue", type=int, default=256, help="answers that may wait beyond those; then 429")
    flags.add_argument("--max_body_mib", type=float, default=1.0)
    flags.add_argument("--max_prompt_tokens", type=int, default=0, help="0: the model's context")
    flags.add_argument("--max_output_tokens", type=int, default=0, help="0: the model's context")
    flags.add_argument("--cache_dtype", default="", choices=["", "int8"], help="of keys and values")
    flags.add_argument("--drain_s", type=int, default=60, help="after SIGTERM, at most")
    args, rest = cli.parse(flags)
    if rest:
        raise InputError(f"--config.{rest[0]}: the config comes from the workdir; leave it out")
    if not 0 <= args.port < 65536:
        raise InputError(f"--port={args.port}: choose 0 to 65535")
    for name in ("slots", "max_body_mib", "drain_s"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name}={getattr(args, name)}: set it above 0")
    for name in ("queue", "max_prompt_tokens", "max_output_tokens"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name}={getattr(args, name)}: set it to 0 or more")
    try:
        from bigmodel import serve
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install 'bigmodel[serve]'") from error
    limits = serve.Limits(
        body_bytes=int(args.max_body_mib * 2**20), prompt_tokens=args.max_prompt_tokens,
        output_tokens=args.max_output_tokens, queue=args.queue,
    )  # fmt: skip
    path = pathlib.Path(args.workdir)
    service = serve.load(
        path, args.step, name=args.name or path.resolve().name, limits=limits, slots=args.slots,
        cache_dtype=args.cache_dtype,
    )  # fmt: skip
    return _run(service, args)


def _run(service: object, args: object) -> int:
    import uvicorn

    from bigmodel import serve

    app = serve.app(service, os.environ.get("BIGMODEL_API_KEY", ""))  # type: ignore[arg-type]
    host, port, drain_s = (getattr(args, key) for key in ("host", "port", "drain_s"))
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=drain_s, lifespan="on"
    )
    try:
        socket = config.bind_socket()
    except SystemExit as error:
        raise InputError(f"--port={port} on {host} cannot be opened; choose another") from error
    server = uvicorn.Server(config)

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, lambda: setattr(server, "should_exit", True))
        print(f"serving   http://{host}:{socket.getsockname()[1]}/", flush=True)
        await server._serve([socket])  # `serve` would take the signals for itself, and end by them

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(listen())
    return 0


if __name__ == "__main__":
    cli.run(main)
