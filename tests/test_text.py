"""Text: files, words, vocabularies on any number of ranks, windows; and the examples on text, in small."""

import json
import os
import re

import numpy as np
import pytest
from launch import environment, mpirun

from mpiml.data import Table, TextFeatures, Vocabulary, read_csv, read_text, share, windows
from mpiml.data.text import PADDING, UNKNOWN, words
from mpiml.nn import Conv1d, Embedding, EmbeddingBag
from mpiml.parallel import Grid

TEXTS = ["the cat and the dog", "The cat; THE CAT!", "a dog", "", "cat's 36 dogs_and\u00efve"]


# --- Files ----------------------------------------------------------------------------------------------------

def test_text_comes_without_a_mark_and_with_newlines(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nand\rmore\n")
    assert read_text(path) == "café\nand\nmore\n"
    path.write_bytes(b"")
    assert read_text(path) == ""


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf_8(tmp_path, mark):
    path = tmp_path / "text"
    path.write_bytes(mark + b"good\nbad: caf\xe9 au lait\n")
    with pytest.raises(ValueError, match=rf"text, line 2: byte {13 + len(mark)} of the file, 0xe9, is not UTF-8"):
        read_text(path)
    assert read_text(path, errors="replace") == f"good\nbad: caf{UNKNOWN} au lait\n"
    with pytest.raises(ValueError, match=r"errors is .* not 'ignore'"):
        read_text(path, "ignore")


# --- Words and vocabularies -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "expected"), [
    ("", []), (" \n\t--", []), ("Don't 'quote' rock 'n' roll", ["don't", "quote", "rock", "n", "roll"]),
    ("don\u2019t", ["don't"]), ("e\u0301te\u0301", ["\u00e9t\u00e9"]), ("a_b 1,000.5 C++", ["a", "b", "1", "000", "5", "c"]),
    ("Москва — 東京", ["москва", "東京"]), (UNKNOWN, [])])
def test_words(text, expected):
    assert words(text) == expected


def test_the_most_frequent_first_and_equals_in_order():
    vocabulary = Vocabulary.of(TEXTS)
    assert vocabulary.tokens == [PADDING, UNKNOWN, "the", "cat", "dog", "36", "a", "and", "andïve", "cat's", "dogs"]
    assert Vocabulary.of(TEXTS, min_count=2).tokens == [PADDING, UNKNOWN, "the", "cat", "dog"]
    assert Vocabulary.of(TEXTS, size=4).tokens == [PADDING, UNKNOWN, "the", "cat"]
    assert Vocabulary.of(["abca"], "character", special=()).tokens == ["a", "b", "c"]


def test_all_ranks_together_make_the_vocabulary_of_one():
    grid = Grid()
    mine = TEXTS[slice(*share(len(TEXTS), grid.rank, grid.size))]
    for options in {}, {"min_count": 2}, {"level": "character", "size": 9}:
        assert Vocabulary.of(mine, grid=grid, **options).tokens == Vocabulary.of(TEXTS, **options).tokens
    table = Table({"text": mine})
    assert TextFeatures.fit(table, ["text"], 4, grid).vocabulary.tokens == Vocabulary.of(TEXTS).tokens


def test_encoding_pads_and_cuts_and_knows_the_unknown():
    vocabulary = Vocabulary.of(TEXTS)
    ids = vocabulary.encode(["the cat and the dog", "a zebra", ""], 4)
    assert ids.dtype == np.int64
    assert [vocabulary.decode(row) for row in ids] == ["the cat and the", f"a {UNKNOWN}", ""]
    assert ids[1:].tolist() == [[vocabulary.tokens.index("a"), 1, 0, 0], [0] * 4]
    assert vocabulary.encode([], 3).shape == (0, 3)


def test_letters_come_back():
    letters = Vocabulary.of(["to be,\nor not"], "character", special=())
    assert letters.decode(letters.ids("not\nto be")) == "not\nto be"


def test_settings_are_json_and_make_the_same():
    table = Table({"title": ["Cats", "Dogs", None], "text": ["and dogs", "", "again, cats"], "other": ["x"] * 3})
    features = TextFeatures.fit(table, ["title", "text"], 3, min_count=1, size=5)
    again = TextFeatures.from_settings(json.loads(json.dumps(features.settings())))
    assert features.settings()["kind"] == "text"
    np.testing.assert_array_equal(again.encode(table), features.encode(table))
    assert [features.vocabulary.decode(row) for row in features.encode(table)] == [f"cats {UNKNOWN} dogs", "dogs", "again cats"]


@pytest.mark.parametrize(("error", "message", "call"), [
    (ValueError, "level is one of word, character, not 'words'", lambda: Vocabulary.of(["a"], "words")),
    (ValueError, "level is one of", lambda: Vocabulary(["a"], "line")),
    (ValueError, "'a' is there several times", lambda: Vocabulary(["a", "b", "a"])),
    (ValueError, "size is a whole number above 0, not 0", lambda: Vocabulary.of(["a"], size=0)),
    (ValueError, "min_count is a whole number above 0, not 1.5", lambda: Vocabulary.of(["a"], min_count=1.5)),
    (ValueError, r"of 2 different words none is left .*min_count=2", lambda: Vocabulary.of(["a b"], min_count=2)),
    (ValueError, "of 0 different words none is left", lambda: Vocabulary.of([])),
    (TypeError, "give .text. for a single one", lambda: Vocabulary.of(["a"]).encode("a", 3)),
    (TypeError, "text 1 is None, not a str: give ''", lambda: Vocabulary.of(["a"]).encode(["a", None], 3)),
    (ValueError, "length is a number of tokens, .* not 0", lambda: Vocabulary.of(["a"]).encode(["a"], 0)),
    (ValueError, "the word 'c', number 2 of a text, is not among the 2", lambda: Vocabulary(["a", "b"]).ids("a c")),
    (ValueError, "text 1 is shorter than 2 words, .* no PADDING", lambda: Vocabulary(["a"]).encode(["a a", "a"], 2)),
    (ValueError, "has no column 'body'", lambda: TextFeatures.fit(Table({"text": ["a"]}), ["body"], 3)),
    (ValueError, "a text of 3 tokens is too short for windows of 3: it takes 4", lambda: windows(np.arange(3), 3)),
    (ValueError, "step is a number of tokens", lambda: windows(np.arange(9), 3, 0))])
def test_what_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("length", "step"), [(4, None), (4, 2), (3, 5), (1, 1), (9, None)])
def test_windows(length, step):
    ids = np.random.default_rng(0).integers(0, 9, 30)
    x, y = windows(ids, length, step)
    starts = range(0, len(ids) - length, step or length)
    np.testing.assert_array_equal(x, [ids[start:start + length] for start in starts])
    np.testing.assert_array_equal(y, [ids[start + 1:start + length + 1] for start in starts])


def test_padding_changes_nothing_in_a_bag():
    bag = EmbeddingBag(9, 4, padding_idx=0).init(seed=0)
    ids = np.array([[3, 5, 0, 0]])
    np.testing.assert_allclose(bag(ids), bag.weight.value[[3, 5]].mean(axis=0)[None], rtol=1e-6)
    np.testing.assert_array_equal(bag(ids), bag(ids[:, :2]))
    assert not bag(np.zeros((1, 4), int)).any()


def test_a_sample_has_the_same_bits_in_any_batch():
    rng = np.random.default_rng(0)
    ids, x = rng.integers(0, 50, (7, 12)), rng.standard_normal((7, 5, 12)).astype(np.float32)
    for layer, samples in (EmbeddingBag(50, 9), ids), (Embedding(50, 9), ids), (Conv1d(5, 6, 3, padding=1), x):
        layer.init(seed=1)
        np.testing.assert_array_equal(layer(samples)[2:3], layer(samples[2:3]))


# --- The examples ---------------------------------------------------------------------------------------------

def news(path, label="4", n=40):
    """A file in which the first word of the title tells the class."""
    firsts = dict(zip("1234", ("election", "football", "shares", "space"), strict=True))
    lines = [f'"{c}","{firsts[c]} today","Word{i % 7} of ""news"", again"\n' for i in range(n) for c in firsts]
    lines[-1] = lines[-1].replace('"4"', f'"{label}"', 1)
    path.write_text("".join(lines))


@pytest.mark.launch
def test_the_news_on_any_number_of_ranks(tmp_path):
    news(tmp_path / "ag_news_test.csv")
    runs = [mpirun(ranks, "examples/ag_news.py", "--data", str(tmp_path), "--lanes", "2", "--batch", "16", "--epochs", "3",
                   "--lr", "0.05", *more)
            for ranks, more in [(1, ()), (2, ("--save", str(tmp_path / "news.safetensors")))]]
    told = [re.findall(r"[\d,]+ words|loss [\d.]+|accuracy [\d.]+", run.out) for run in runs]
    assert told[0] == told[1], runs[1].err
    assert told[0][-1] == "accuracy 1.0000"
    from mpiml.save import load_model
    model, about = load_model(tmp_path / "news.safetensors")
    features = TextFeatures.from_settings(about["input"])
    x = features.encode(Table({"title": ["Football news"], "description": ["again"]}))
    assert about["target"]["classes"][int(model(x).argmax())] == "sports"


@pytest.mark.launch
def test_the_news_refuse_a_class_that_is_none(tmp_path):
    news(tmp_path / "ag_news_test.csv", label="5")
    run = mpirun(2, "examples/ag_news.py", "--data", str(tmp_path))
    assert run.code and re.search(r"ag_news_test.csv, line 160, column class: '5' is none of the 4 known values", run.err)


@pytest.mark.launch
def test_the_examples_ask_for_their_data():
    for example in "ag_news", "shakespeare":
        run = mpirun(1, f"examples/{example}.py")
        assert run.code == 2 and "Name it by --data FOLDER" in run.err


@pytest.mark.launch
def test_shakespeare_on_any_grid(tmp_path):
    path = tmp_path / "text"
    path.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)},\n" for i in range(150)))
    small = ["--text", str(path), "--width", "16", "--heads", "2", "--layers", "1", "--context", "16", "--epochs", "2"]
    told = []
    for ranks, more in (1, ()), (2, ("--pipe", "2")):
        run = mpirun(ranks, "examples/shakespeare.py", *small, "--lanes", "2", "--sample", "9", "--prompt", "3 ti", *more)
        assert run.code == 0, run.err
        told.append([*re.findall(r"loss [\d.]+|weights \w+", run.out), run.out.splitlines()[-1]])
    assert told[0] == told[1] and told[0][-1].startswith("3 ti")
    path.write_bytes(b"fine\n\xff")
    run = mpirun(1, "examples/shakespeare.py", *small)
    assert run.code == 2 and re.search("line 2: byte 5 of the file, 0xff, is not UTF-8", run.err)


@pytest.mark.launch
def test_real_news():
    folder = os.environ.get("MPIML_DATA")
    if not folder:
        pytest.skip("MPIML_DATA names no folder with AG News")
    run = mpirun(2, "examples/ag_news.py", "--epochs", "3", env=environment(MPIML_DATA=folder))
    assert float(run.out.split()[-1]) >= 0.84, run.err


def test_real_rows_are_read_whole():
    folder = os.environ.get("MPIML_DATA")
    if not folder:
        pytest.skip("MPIML_DATA names no folder with AG News")
    table = read_csv(os.path.join(folder, "text", "ag_news_test.csv"), ["class", "title", "description"])
    assert len(table) == 7600 and all((table["class"] == c).sum() == 1900 for c in "1234")
    assert not any((table[name] == "").any() for name in table.names)
