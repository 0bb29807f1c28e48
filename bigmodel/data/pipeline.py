"""From a config to batches: `tasks.make_pipeline(config, "train")[step]`, a pure function of (seed, step).

The global batch of a step is the same whatever the number of hosts; each host reads its own rows of it. So a
run resumes from the step alone, on any number of hosts, and a checkpoint keeps `fingerprint()` to prove that
the data is the same.

Letters: B examples a step over all hosts, b rows of this host, n examples in a pass, L tokens.
"""

from __future__ import annotations

import pathlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np

from bigmodel.config import Config, InputError
from bigmodel.data import shuffle, transforms
from bigmodel.data.facts import Facts
from bigmodel.data.source import ALL

Split = Literal["train", "eval"]
FILES = ("text:", "pairs:", "table:", "folder:", "images:")  # sources whose split `all` holds every record
EVAL_SEED = 0  # evaluation draws the same whatever the run's seed, so that runs can be compared


class Examples(Protocol):
    """Model-ready examples by index: packed windows, or a source of images."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...


Mix = Callable[[transforms.Batch, transforms.Batch, np.ndarray], transforms.Batch]


class Order(Protocol):
    def take(self, positions: np.ndarray) -> np.ndarray: ...


class Parts(NamedTuple):
    """The examples of a task, and how a batch is made of them."""

    examples: Examples
    finish: transforms.Transform
    facts: dict[str, Any]
    mix: Mix | None = None  # (rows, their partners, positions in the run) -> rows
    order: Order | None = None  # the examples at positions of the run, where it is not a shuffle of all
    amount: str = ""  # of the data, for people; "": so many examples
    split_rule: str = ""  # see source.py
    where: Callable[[int], str] | None = None  # an example's file, or its line of one, for people


class Pipeline:
    """Batches by step. Training shuffles anew each epoch and never ends; evaluation is one pass in order."""

    def __init__(
        self,
        parts: Parts,
        *,
        facts: Mapping[str, Any],
        batch_size: int,
        seed: int | None,
        max_batches: int | None,
        process_index: int,
        process_count: int,
        class_names: tuple[str, ...] = (),
        fitted: Facts | None = None,
    ) -> None:
        """Use `make_pipeline`. `seed` None: in order; `max_batches` None: no end, else so many at most.

        The parts' `order` takes the place of the shuffle; `mix` joins each row with its opposite one.
        """
        self._examples, self._finish, self._mix = parts.examples, parts.finish, parts.mix
        self._facts = {**parts.facts, **facts}
        self._batch_size, self._rows = batch_size, batch_size // process_count
        self._process_index, self._process_count = process_index, process_count
        self.num_examples = len(self._examples)
        self.amount = parts.amount or f"{self.num_examples:,} examples"
        self.split_rule, self.where = parts.split_rule, parts.where
        self.class_names, self._fitted = class_names, fitted
        self._len = sys.maxsize if max_batches is None else max_batches
        self._order = (parts.order or _order(self.num_examples, seed)) if max_batches is None else None

    def __len__(self) -> int:
        """Batches in all; `sys.maxsize` for training, which never ends."""
        return self._len

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """This host's rows of the batch of a step: the arrays of `spec()` with b rows for B.

        Raises:
            IndexError: a step past the end, or below 0.
            InputError: a damaged record, or an id that the model has no place for.
        """
        if not 0 <= step < self._len:
            raise IndexError(f"step {step} is not in 0..{self._len - 1}")
        positions = self._positions(step)
        if self._mix is None:
            return transforms.pad_rows(self._read(positions), self._rows)
        # Row r's partner is row B - 1 - r, which may be another host's: it is then made here as well.
        partners = (2 * step + 1) * self._batch_size - 1 - positions
        both, at = np.unique(np.concatenate([positions, partners]), return_inverse=True)
        made = self._read(both)
        own, other = ({k: v[rows] for k, v in made.items()} for rows in np.split(at, 2))
        return transforms.pad_rows(self._mix(own, other, positions), self._rows)

    def _read(self, positions: np.ndarray) -> transforms.Batch:
        indices = self._indices(positions)
        # What is drawn for a row depends on its place in the endless order; in evaluation, on its example.
        return self._finish(self._examples.read(indices), indices if self._order is None else positions)

    def indices(self, step: int) -> np.ndarray:
        """(<= b,) the examples of this host's rows; fewer than b only in the last batch of an evaluation."""
        return self._indices(self._positions(step))

    def examples_at(self, positions: np.ndarray) -> np.ndarray:
        """The examples at places of an evaluation, which counts all hosts' rows from 0."""
        return self._indices(positions)

    def read(self, indices: np.ndarray) -> transforms.Batch:
        """Rows of these examples, as batches of an evaluation have them."""
        return self._finish(self._examples.read(indices), indices)

    def _positions(self, step: int) -> np.ndarray:
        """(<= b,) the places of this host's rows in the run's order."""
        start = step * self._batch_size + self._process_index * self._rows
        end = start + self._rows
        if self._order is not None:
            return np.arange(start, end)
        read = self._num_read()
        return np.arange(min(start, read), min(end, read))

    def _indices(self, positions: np.ndarray) -> np.ndarray:
        if self._order is not None:
            return self._order.take(positions)
        # A part of the split is spread evenly over it: its beginning may be one document, or one class.
        return positions * self.num_examples // self._num_read()

    def _num_read(self) -> int:
        return min(self.num_examples, self._len * self._batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[step] for step in range(self._len))

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The global batch, as it comes out (one row is read)."""
        row = self._finish(self._examples.read(np.array([0])), np.array([0]))
        shapes = {key: (value.shape[1:], value.dtype) for key, value in row.items()}
        shapes["mask"] = ((), np.dtype(np.float32))
        return {k: jax.ShapeDtypeStruct((self._batch_size, *s), d) for k, (s, d) in shapes.items()}

    def keep_facts(self) -> None:
        """Writes into the workdir what was fitted to the data; the first process alone does."""
        if self._fitted and jax.process_index() == 0:
            self._fitted.keep()

    def fingerprint(self) -> dict[str, Any]:
        """Returns what decides the order and content of batches, for JSON; not the number of hosts."""
        return {**self._facts, "batch_size": self._batch_size, "num_examples": self.num_examples}


class Reader(Protocol):
    """The part of a task that makes examples; see tasks/base.py."""

    def examples(self, split: str, facts: Facts, train: bool) -> Parts: ...

    def class_names(self, facts: Facts) -> tuple[str, ...]: ...


def open_pipeline(
    config: Config,
    split: Split,
    reader: Reader,
    workdir: pathlib.Path | None = None,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Pipeline:
    """Opens the data of `config` for training or evaluation, as `tasks.make_pipeline` does.

    Args:
        split: `train` reads `data.split` and shuffles; `eval` reads `data.eval_split` in order, at most
            `eval.batches` batches; the last one is filled up with rows whose `mask` is 0.
        workdir: where what training fits (facts.py, a tokenizer) is kept, and read from later; training
            data that disagree with it are refused. One of an older version, which has checkpoints and no
            facts, gets them by `keep_facts`, when the data are seen to be those that it was trained on.
        process_index, process_count: this host; None asks JAX.

    Raises:
        InputError: data that is not there or does not fit the model; see sources.py and text.py.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if config.batch_size % count:
        raise InputError(f"batch_size is {config.batch_size}, which does not divide over {count} hosts")
    name = config.data.split if split == "train" else config.data.eval_split
    if split == "train" and name == ALL and config.data.name.startswith(FILES):
        raise InputError("data.split=all would train on what is held out; set it to train")
    facts = Facts(config, workdir, training=split == "train")
    parts = reader.examples(name, facts, split == "train")
    class_names = reader.class_names(facts)
    most = None if split == "train" else _eval_batches(config, len(parts.examples))
    if split == "train":
        _check_enough(config, parts, name)
    shuffled = split == "train" and config.data.shuffle
    seed = _shuffle_seed(config.seed) if shuffled else None
    about = {
        "name": config.data.name,
        "split": name,
        "shuffle": shuffled,
        "seed": config.seed if shuffled else None,
    }
    made = Pipeline(
        parts,
        facts=about,
        batch_size=config.batch_size,
        seed=seed,
        max_batches=most,
        process_index=index,
        process_count=count,
        class_names=class_names,
        fitted=facts if split == "train" else None,
    )
    if not facts.is_late:
        made.keep_facts()
    return made


def _check_enough(config: Config, parts: Parts, split: str) -> None:
    """Raises InputError where the examples do not fill a batch."""
    if len(parts.examples) < config.batch_size:
        lower = "batch_size or seq_len" if "seq_len" in parts.facts else "batch_size"
        raise InputError(
            f"data.name={config.data.name!r} split {split!r} makes {len(parts.examples)} examples, fewer "
            f"than batch_size={config.batch_size}; lower {lower}, or give more data"
        )


def _eval_batches(config: Config, num_examples: int) -> int:
    all_batches = -(-num_examples // config.batch_size)
    return all_batches if config.eval.batches < 0 else min(all_batches, config.eval.batches)


def _shuffle_seed(seed: int) -> int:
    """Epoch e is shuffled with seed + e: neighboring seeds would share epochs. Hashing separates them."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])


def _order(num_examples: int, seed: int | None) -> Order:
    """The endless order of a run: each epoch is a new permutation of all examples, or all in turn."""
    return shuffle.InTurn(num_examples) if seed is None else shuffle.Shuffled(num_examples, seed)


# ----------------------------------------------------------------------------------------------- prefetch


class Batches(Protocol):
    """Batches by number, such as a Pipeline."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> dict[str, np.ndarray]: ...


class Ready(NamedTuple):
    """One prefetched batch."""

    step: int
    batch: Any  # what `put` returned
    wait_s: float  # how long the consumer waited for it


class Prefetch:
    """Iterates over batches that a thread reads and places ahead of time.

    with Prefetch(pipeline, start_step, put, depth) as batches:
        for step, batch, wait_s in batches: ...
    """

    def __init__(
        self,
        pipeline: Batches,
        start_step: int = 0,
        put: Callable[[dict[str, np.ndarray]], Any] = lambda batch: batch,
        depth: int = 2,
        stalled: Callable[[], bool] | None = None,
    ) -> None:
        """Args: put: places a batch on the devices; depth: batches kept ready; stalled: asked while a batch
        is waited for: when it says yes, iteration ends."""
        self._pipeline, self._put, self._stalled = pipeline, put, stalled
        self._room = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start_step,), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, step: int) -> None:
        """Always ends by putting an exception in the queue, so that the consumer never waits for nothing."""
        try:
            while step < len(self._pipeline):
                self._room.acquire()
                if self._closed.is_set():
                    break
                self._ready.put((step, self._put(self._pipeline[step]), None))
                step += 1
            raise StopIteration
        except BaseException as error:
            self._ready.put((step, None, error))

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> Ready:
        """Raises what reading this step's batch raised; StopIteration at the end or after `close`."""
        if self._closed.is_set():
            raise StopIteration
        start = time.perf_counter()
        step, batch, error = self._next()
        if error is not None:
            self._closed.set()  # no join: the thread is at its end, or another consumer closed
            raise error
        self._room.release()
        return Ready(step, batch, time.perf_counter() - start)

    def _next(self) -> tuple[int, Any, BaseException | None]:
        while True:
            try:
                return self._ready.get(timeout=0.5 if self._stalled else None)
            except queue.Empty:
                if self._stalled and self._stalled():
                    return -1, None, StopIteration()

    def close(self) -> None:
        """Stops the thread; a read under way is waited for, but not for long."""
        self._closed.set()
        self._room.release()
        self._ready.put((-1, None, StopIteration()))  # for a consumer that waits in another thread
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1 if self._stalled and self._stalled() else 10)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
