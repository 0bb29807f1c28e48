"""Files are complete or not there; damaged ones beside a run never stop it; a disk's errors are one line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pathlib
from typing import Any

import pytest
from conftest import ROOT, run_script, tiny

from bigmodel import disk, log, workdir
from bigmodel.config import InputError
from bigmodel.data.builders import prepare

FULL = OSError(errno.ENOSPC, "No space left on device")


def full(*args: Any, **kwargs: Any) -> Any:
    raise FULL


def raising(error: Exception) -> Any:
    """A function that raises it, whatever it is given."""

    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


# ------------------------------------------------------------------------------------------- atomic files


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    disk.write_json(path, {"x": 1})

    def half(file: Any) -> None:
        file.write(b"half")
        raise FULL

    with pytest.raises(InputError, match=r"a\.json cannot be written \(No space left on device\); make room"):
        disk.write_atomically(path, half)
    assert os.listdir(tmp_path) == ["a.json"]
    assert disk.read_json(path) == {"x": 1}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["mkdir", "replace", "fsync"])
def test_any_step_of_writing_may_fail(tmp_path, monkeypatch, name):
    if name == "mkdir":
        monkeypatch.setattr(pathlib.Path, "mkdir", full)
    else:
        monkeypatch.setattr(os, name, full)
    with pytest.raises(InputError, match="No space left"):
        disk.write_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"null", b"3", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b"{", b"NaN x"]
)
def test_what_is_no_json_object_is_one_error(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        disk.read_json(path)
    with pytest.raises(InputError, match=r"config\.json.*restore it"):
        workdir.read_config(tmp_path)
    workdir.write_config(tmp_path, tiny("cnn"))
    assert workdir.read_config(tmp_path) == tiny("cnn")
    (aside,) = tmp_path.glob("config.json.damaged-*")
    assert aside.read_bytes() == content


@pytest.mark.parametrize(
    "tree", [{"model": {"name": []}}, {"model": 3}, {"steps": "x"}, {"optim": {"lr": -1}}]
)
def test_a_config_of_other_things_is_one_error_that_names_the_file(tmp_path, tree):
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"config\.json"):
        workdir.read_config(tmp_path)
    assert workdir.last_config(tmp_path) is None


def test_an_error_of_the_block_is_not_hidden_by_what_is_written_after_it(caplog):
    def write() -> None:
        raise InputError("ledger.json cannot be written")

    with pytest.raises(ZeroDivisionError), disk.after(write):
        raise ZeroDivisionError
    assert "ledger.json cannot be written" in caplog.text
    with pytest.raises(InputError, match=r"ledger\.json"), disk.after(write):
        pass


# ------------------------------------------------------------------------------------------------ metrics


def metrics_of(path: pathlib.Path) -> list[tuple[int, Any]]:
    return [(row["step"], row.get("a")) for row in log.read_metrics(path)]


def write_steps(path: pathlib.Path, first: int, *steps: int) -> None:
    with log.Writer(path, first_step=first, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, {"a": float(step)})


def test_a_resume_drops_the_steps_it_does_not_have_and_keeps_every_other_byte(tmp_path):
    write_steps(tmp_path, 0, 1, 2, 3, 4)
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    write_steps(tmp_path, 4, 5)  # nothing to drop: appended to
    assert path.read_bytes().startswith(before)
    write_steps(tmp_path, 2, 3)
    assert metrics_of(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_line_that_a_kill_cut_short_is_no_damage(tmp_path, caplog):
    write_steps(tmp_path, 0, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "a')
    assert metrics_of(tmp_path) == [(1, 1.0)]
    write_steps(tmp_path, 1, 2)
    assert metrics_of(tmp_path) == [(1, 1.0), (2, 2.0)]
    assert not caplog.records
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "bad",
    [b"garbage", b'{"loss": 1}', b'{"step": "3"}', b'{"step": null}', b"[1, 2]", b"\xff\xfe", b"",
     b"[" * 90_000, b"\x00" * 40, b'{"step": 1}\r{"step": 2}'],
)  # fmt: skip
def test_damaged_lines_are_left_out_told_of_and_kept_aside(tmp_path, caplog, bad):
    write_steps(tmp_path, 0, 1, 2)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    content = b"\n".join([lines[0], bad, *lines[1:]])
    path.write_bytes(content)
    assert metrics_of(tmp_path) == [(1, 1.0), (2, 2.0)]
    assert "line 2" in caplog.text
    write_steps(tmp_path, 2, 3)
    assert metrics_of(tmp_path)[-3:] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    (aside,) = tmp_path.glob("metrics.jsonl.damaged-*")
    assert aside.read_bytes() == content


def test_metrics_survive_a_disk_that_is_full_at_the_resume(tmp_path, monkeypatch):
    write_steps(tmp_path, 0, 1, 2, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be written \(No space left"):
        write_steps(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_line_that_finds_no_room_leaves_none_of_it(tmp_path, monkeypatch):
    with log.Writer(tmp_path, first_step=0, tensorboard=False) as writer:
        writer.write(1, {"a": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size

        class Short:
            """Takes a few bytes, then none."""

            def __init__(self, file: Any) -> None:
                self.file, self.fileno, self.truncate, self.close = (
                    file,
                    file.fileno,
                    file.truncate,
                    file.close,
                )

            def write(self, line: bytes) -> int:
                if len(line) < 20:
                    raise FULL
                return self.file.write(line[:10])

        # Private: a disk that takes half a line is none that a test can mount.
        monkeypatch.setattr(writer, "_file", Short(writer._file))
        with pytest.raises(InputError, match=r"metrics\.jsonl cannot be written"):
            writer.write(2, {"a": 2.0})
        assert (tmp_path / "metrics.jsonl").stat().st_size == size


def test_tensorboard_that_finds_no_room_is_an_error_at_once(tmp_path, monkeypatch):
    with log.Writer(tmp_path, first_step=0, tensorboard=True) as writer:
        writer.write(1, {"a": 1.0})
        with monkeypatch.context() as patch:
            # Private: TensorBoard's own writer, in a thread of its own, meets the full disk.
            patch.setattr(writer._board._writer, "flush", full)
            with pytest.raises(InputError, match=r"tb cannot be written \(No space left on device\)"):
                writer.write(2, {"a": 1.0})


# ---------------------------------------------------------------------------------------------- directories


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        monkeypatch.setattr(
            fcntl, "flock", lambda *_, n=number: (_ for _ in ()).throw(OSError(n, "no locks"))
        )
        with workdir.claim(tmp_path / "run"), disk.locked(tmp_path / "cache" / "x.lock"):
            pass
    assert caplog.text.count("cannot be locked") == 6
    monkeypatch.setattr(fcntl, "flock", raising(OSError(errno.EIO, "broken")))
    with pytest.raises(InputError, match="broken"), workdir.claim(tmp_path / "run"):
        pass


def start_that_fails(path: pathlib.Path, trained: bool) -> None:
    with workdir.claim(path):
        (path / "checkpoints").mkdir()
        (path / "fitted.json").touch()
        if trained:
            workdir.write_config(path, tiny("cnn"))
        raise InputError("no data")


def test_a_start_that_fails_leaves_no_directory_that_was_not_there(tmp_path):
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "a" / "b" / "c", tmp_path / "there"):
        with pytest.raises(InputError, match="no data"):
            start_that_fails(path, trained=False)
    assert os.listdir(tmp_path) == ["there"]
    with pytest.raises(InputError, match="no data"):
        start_that_fails(tmp_path / "kept", trained=True)
    assert (tmp_path / "kept" / "config.json").exists()


@pytest.mark.parametrize("path", ["", "  ", "gs://bucket/run", "s3://b", "/tmp/\udce9"])
def test_directories_that_are_none_are_refused(path):
    with pytest.raises(InputError, match=r"empty|is a URL; mount it|not UTF-8"), workdir.claim(path):
        pass


@pytest.mark.parametrize("name", ["train.py", "evaluate.py", "generate.py", "export.py", "compress.py"])
def test_scripts_refuse_an_empty_workdir(name):
    more = {"train.py": ["--config=configs/cnn.py"], "compress.py": ["--recipe=quantize:int8"]}.get(name, [])
    out = ["--out=x"] if name in ("export.py", "compress.py") else []
    ran = run_script(name, "--workdir=", *more, *out)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1), ran
    assert "--workdir" in ran.err
    assert "is empty" in ran.err


def test_without_a_home_nothing_is_kept(monkeypatch, caplog):
    monkeypatch.delenv("BIGMODEL_CACHE", raising=False)
    monkeypatch.setattr(
        pathlib.Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home"))
    )
    disk._homeless.cache_clear()
    with caplog.at_level("INFO", "bigmodel"):
        folder = disk.cache_dir()
    assert folder.is_dir()
    assert disk.cache_dir() == folder
    assert "$BIGMODEL_CACHE" in caplog.text
    disk._homeless().cleanup()
    disk._homeless.cache_clear()


@pytest.mark.parametrize("data_dir", [None, "~/sets", "~nobody-of-this-name/sets"])
def test_datasets_that_need_a_home_are_refused_without_one(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without a home
    for name in ("digits", "mnist"):
        with pytest.raises(InputError, match=r"needs a home directory.*\$TFDS_DATA_DIR"):
            prepare.find(name, data_dir)
    assert os.listdir(tmp_path) == []


def test_nothing_advises_to_install_a_package_of_our_name():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("bigmodel/**/*.py"), *ROOT.glob("scripts/*")]:
        if path.is_file():
            assert "bigmodel[" not in path.read_text(encoding="utf-8"), path
