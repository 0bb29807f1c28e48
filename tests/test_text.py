"""Tokenizers are exact, and packing loses no token, repeats none and mixes no documents."""

import numpy as np
import pytest

from bigmodel import config as configs
from bigmodel import disk
from bigmodel.config import InputError
from bigmodel.data import corpus, token_cache, tokenizers

DOCUMENTS = [
    b"hello world\n",
    "h\u00e9 \u4f60\u597d \U0001f600".encode(),
    b"x",
    b"a <|endoftext|> b",
    b"0123456789" * 30,
]
STRINGS = [
    "",
    " ",
    "a",
    "\n\n\t  x",
    "\x00\x01\x7f",
    "\u200d\ufeff\u0301",
    "\U0001f468\u200d\U0001f469 caf\u00e9 \u0928\u092e",
    "<|endoftext|>",
]


class Memory:
    """A source of documents that are in memory."""

    def __init__(self, documents=DOCUMENTS, name="memory"):
        self.documents = np.array(documents, object)
        self.num_bytes = sum(map(len, documents))
        self.fingerprint = f"{name} {hash(tuple(documents))}"
        self.reads = 0

    def __len__(self):
        return len(self.documents)

    def read(self, indices):
        self.reads += 1
        return {"text": self.documents[indices]}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.BPE.train((d.decode() * 3 for d in DOCUMENTS), 300)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return tokenizers.Bytes() if request.param == "bytes" else bpe


def test_round_trip_is_exact_for_any_unicode(tokenizer):
    every_plane = "".join(chr(c) for c in range(0, 0x110000, 997) if not 0xD800 <= c < 0xE000)
    for string in [*STRINGS, every_plane]:
        ids = tokenizer.encode(string)
        assert tokenizer.decode(ids) == string
        assert tokenizer.token_bytes[ids].sum() == len(string.encode())
        assert tokenizer.separator not in ids
        np.testing.assert_array_equal(tokenizer.encode_all([string.encode()])[0], ids)


def test_ids_that_are_no_text_decode_to_something(tokenizer):
    assert tokenizer.decode([tokenizer.separator]) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"
    assert tokenizer.decode(tokenizers.Bytes().encode("\u4f60")[:2]) is not None
    assert tokenizer.token_bytes[tokenizer.separator] == 0


def test_a_lone_surrogate_is_an_input_error(tokenizer):
    with pytest.raises(InputError, match="surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_bpe_saves_loads_and_trains_the_same(bpe, tmp_path):
    bpe.save(tmp_path / "t.json")
    again = tokenizers.BPE.load(tmp_path / "t.json")
    assert again.fingerprint == bpe.fingerprint
    np.testing.assert_array_equal(again.encode("hello"), bpe.encode("hello"))
    assert tokenizers.BPE.train((d.decode() * 3 for d in DOCUMENTS), 300).fingerprint == bpe.fingerprint
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad\.json"):
        tokenizers.BPE.load(tmp_path / "bad.json")


def test_the_workdir_keeps_the_tokenizer(tmp_path):
    path = tmp_path / "path.txt"
    path.write_text("the cat sat on the mat\n" * 200)
    config = configs.from_dict({"data": {"name": f"text:{path}", "tokenizer": "bpe:270"}})
    first = corpus.get_tokenizer(config, tmp_path)
    path.write_text("quite another text, is it not\n" * 200)
    assert corpus.get_tokenizer(config, tmp_path).fingerprint == first.fingerprint
    smaller = configs.from_dict({"data": {"name": f"text:{path}", "tokenizer": "bpe:260"}})
    with pytest.raises(InputError, match=r"data\.tokenizer.*tokenizer\.json"):
        corpus.get_tokenizer(smaller, tmp_path)
    with pytest.raises(InputError, match="too small"):
        corpus.get_tokenizer(configs.from_dict({"data": {"tokenizer": "bpe:100"}}))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("seq_len", [2, 7, 64, 1000])
def test_no_token_is_lost_and_none_is_a_target_twice(tokenizer, seq_len, cache):
    stream = corpus.token_stream(Memory(), tokenizer, cache=cache)
    packed = corpus.Packed(stream, tokenizer, seq_len)
    batch = packed.read(np.arange(len(packed)))
    real = batch["segments"] > 0
    np.testing.assert_array_equal(batch["targets"][real], stream[1:])
    np.testing.assert_array_equal(batch["tokens"][real], stream[:-1])
    documents = _split(batch["targets"][real], tokenizer.separator)
    assert [tokenizer.decode(d).encode() for d in documents] == DOCUMENTS
    assert batch["target_bytes"].sum() == sum(map(len, DOCUMENTS))
    assert not any(batch[key][~real].any() for key in batch)


def _split(ids, separator):
    ends = np.flatnonzero(ids == separator)
    assert ends[-1] == len(ids) - 1
    return [part[part != separator] for part in np.split(ids, ends + 1)[:-1]]


def test_segments_and_positions_restart_with_each_document(tokenizer):
    stream = corpus.token_stream(Memory(), tokenizer)
    document = np.cumsum(stream == tokenizer.separator)
    packed = corpus.Packed(stream, tokenizer, 16)
    batch = packed.read(np.arange(len(packed)))
    for row in range(len(packed)):
        valid = batch["segments"][row] > 0
        inside = document[row * 16 : row * 16 + 16][: valid.sum()]
        segments, positions = batch["segments"][row][valid], batch["positions"][row][valid]
        np.testing.assert_array_equal(segments, inside - inside[0] + 1)
        for segment in np.unique(segments):
            np.testing.assert_array_equal(
                positions[segments == segment], np.arange((segments == segment).sum())
            )


def test_reading_is_by_row(bpe):
    packed = corpus.Packed(corpus.token_stream(Memory(), bpe), bpe, 4)
    every = packed.read(np.arange(len(packed)))
    some = np.array([len(packed) - 1, 0, 2, 2])
    for key, value in packed.read(some).items():
        np.testing.assert_array_equal(value, every[key][some])
        assert packed.read(np.array([], int))[key].shape == (0, 4)


def test_the_stream_is_encoded_once_and_a_cut_file_again():
    source, tokenizer = Memory(), tokenizers.Bytes()
    first = np.array(corpus.token_stream(source, tokenizer))
    reads = source.reads
    corpus.token_stream(source, tokenizer)
    assert source.reads == reads
    (path,) = disk.cache_dir().glob("tokens-*.bin")
    path.write_bytes(path.read_bytes()[:-6])
    np.testing.assert_array_equal(corpus.token_stream(source, tokenizer), first)
    other = corpus.token_stream(Memory([b"other"], "other"), tokenizer)
    assert len(other) == 7
    assert not list(disk.cache_dir().glob(".tokens-*"))  # nothing half-written stays


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("where", [1, 70_001, -2])
def test_an_overwritten_token_file_is_made_anew_with_a_word(own_cache, caplog, where):
    """Its first and last id stay, as another path' would be."""
    documents = [bytes([65 + i % 26]) * 90 for i in range(900)]
    first = np.array(corpus.token_stream(Memory(documents), tokenizers.Bytes()))
    (path,) = own_cache.glob("tokens-*.bin")
    ids = np.fromfile(path, np.uint16)
    ids[where] = 77 if ids[where] != 77 else 78
    path.write_bytes(ids.tobytes())
    with caplog.at_level("WARNING", "bigmodel"):
        stream = corpus.token_stream(Memory(documents), tokenizers.Bytes())
    np.testing.assert_array_equal(stream, first)
    assert "is not what was written" in caplog.text
    assert "made anew" in caplog.text
    np.testing.assert_array_equal(np.fromfile(path, np.uint16), first)


def test_a_large_token_file_is_checked_where_it_is_read(own_cache, monkeypatch):
    monkeypatch.setattr(token_cache, "CHECKED_AT_OPEN", 0)
    documents = [bytes([65 + i % 26]) * 90 for i in range(3000)]
    first = np.array(corpus.token_stream(Memory(documents), tokenizers.Bytes()))
    (path,) = own_cache.glob("tokens-*.bin")
    ids = np.fromfile(path, np.uint16)
    ids[50_000:60_000] = ids[50_000:60_000][::-1]
    path.write_bytes(ids.tobytes())
    packed = corpus.Packed(
        corpus.token_stream(Memory(documents), tokenizers.Bytes()), tokenizers.Bytes(), 100
    )
    row = packed.read(np.array([0, 200, 1900, len(packed) - 1]))
    np.testing.assert_array_equal(row["tokens"][1], first[20_000:20_100])
    with pytest.raises(InputError, match=r"tokens-.*block 1 is not what was written.*start again"):
        packed.read(np.array([3, 550]))
    stream = corpus.token_stream(Memory(documents), tokenizers.Bytes())
    packed = corpus.Packed(stream, tokenizers.Bytes(), 100)
    every = packed.read(np.arange(len(packed)))
    np.testing.assert_array_equal(every["targets"][every["segments"] > 0], first[1:])
    assert stream.checked.all()


@pytest.mark.parametrize("lost", ["tokens-*.crc", "tokens-*.bin"])
def test_half_a_token_file_is_made_anew(own_cache, lost):
    first = np.array(corpus.token_stream(Memory(), tokenizers.Bytes()))
    next(own_cache.glob(lost)).write_bytes(b"")
    np.testing.assert_array_equal(corpus.token_stream(Memory(), tokenizers.Bytes()), first)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match="BIGMODEL_CACHE"):
        corpus.token_stream(Memory(), tokenizers.Bytes())


def test_long_corpora_are_encoded_in_pieces(monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 64)
    documents = [bytes([65 + i % 26]) * (i % 50) for i in range(200)]
    stream = corpus.token_stream(Memory(documents), tokenizers.Bytes())
    expected = b"|".join([b"", *documents, b""])
    assert bytes(np.where(stream == 256, ord("|"), stream).astype(np.uint8)) == expected
