"""The process that talks to Weights & Biases for `tracking.py`: reads messages, a JSON object a line.

    {"start": {arguments of wandb.init}, "settings": {...}}   answered by {"place": URL or "offline"}
    {"log": {name: value}, "step": N}
    {"picture": PNG in base64, "name": NAME, "step": N}
    {"finish": exit code}

An error is answered by {"error": text}, and ends the process. So does the end of its input: the run has died.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any


def serve(lines: Iterable[bytes], answer: Callable[[dict[str, str]], None]) -> None:
    """Carries messages out until the run is finished."""
    import wandb

    run: Any = None
    for line in lines:
        message = json.loads(line)
        if "start" in message:
            run = wandb.init(**message["start"], settings=wandb.Settings(**message["settings"]))
            answer({"place": "offline" if run.offline else run.url})
        elif "finish" in message:
            run.finish(exit_code=message["finish"])
            return
        elif message["step"] >= run.step:  # an earlier session logged the others
            run.log(
                message.get("log") or {message["name"]: _picture(message["picture"])}, step=message["step"]
            )
    if run is not None:
        run.finish(exit_code=1)


def _picture(text: str) -> Any:
    import PIL.Image
    import wandb

    return wandb.Image(PIL.Image.open(io.BytesIO(base64.b64decode(text))))


def main() -> None:
    """Serves stdin; what libraries print does not get among the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, str]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        serve(sys.stdin.buffer, answer)
    except Exception as error:
        answer({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        sys.exit(1)


if __name__ == "__main__":
    main()
