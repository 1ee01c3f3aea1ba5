"""Text as numbers: reading files, cutting text into words or characters, and the numbers of these."""

import json
import re
import unicodedata
from collections import Counter

import numpy as np

from mpiml.alone import Alone

PADDING = ""  # fills up short texts
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for every token that is not in the vocabulary
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def read_text(path, errors="strict"):
    """The text in a file of UTF-8, without a byte order mark, and with ``\\n`` for a newline whatever stands in the file.

    Parameters
    ----------
    path : str or path
    errors : "strict" or "replace"
        What to do with bytes that are not UTF-8: refuse the file, or put U+FFFD in their place, which encoders take for an
        unknown character.

    Raises
    ------
    FileNotFoundError
    ValueError
        The file is not UTF-8; the message names line and byte.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f'errors is "strict" or "replace", not {errors!r}')
    with open(path, "rb") as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        # The position it tells does not count a byte order mark.
        at = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, at) + 1
        raise ValueError(f"{path}, line {line}: byte {at} of the file, 0x{data[at]:02x}, is not UTF-8 ({error.reason}): "
                         f"convert the file (iconv -f LATIN1 -t UTF-8, say), or read it with errors=\"replace\"") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def words(text):
    """The words of a text: in lower case, runs of letters and digits, apostrophes between them included.

    All else (spaces, punctuation, underscores) separates words. Characters that can be written in several ways are brought to
    one (NFC), and a typographic apostrophe is an apostrophe. Unicode says what is a letter or a digit. Marks that are
    characters of their own, as the vowels of Devanagari, are neither, and scripts without spaces give whole sentences: cut
    such texts into characters.

    >>> words("The U.N. doesn't use \\u201ce-mail\\u201d: 36 caf\\u00e9s do.")
    ['the', 'u', 'n', "doesn't", 'use', 'e', 'mail', '36', 'cafés', 'do']
    """
    return _WORD.findall(unicodedata.normalize("NFC", text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


_LEVELS = {"word": words, "character": list}


def _cutter(level):
    """The function that cuts a text into tokens of this level."""
    if level not in _LEVELS:
        raise ValueError(f"level is one of {', '.join(_LEVELS)}, not {level!r}")
    return _LEVELS[level]


class Vocabulary:
    """The tokens (words, or characters) that a model knows; a token's id is its place among them.

    The tokens ``PADDING``, the empty text, and ``UNKNOWN``, U+FFFD, have the meaning of their names, if they are there: an
    unknown token is an error for a vocabulary without ``UNKNOWN``, and so is a short text without ``PADDING``.

    Parameters
    ----------
    tokens : sequence of str
    level : "word" or "character"
        How texts are cut into tokens: by :func:`words`, or into characters as they are.

    Examples
    --------
    >>> vocabulary = Vocabulary.of(["to be or not to be", "to do"], min_count=2)
    >>> vocabulary.tokens
    ['', '�', 'to', 'be']
    >>> vocabulary.encode(["To be!", "Not to be seen"], length=3)
    array([[2, 3, 0],
           [1, 2, 3]])
    """

    def __init__(self, tokens, level="word"):
        self.tokens, self.level, self._cut = list(tokens), level, _cutter(level)
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self._ids) < len(self.tokens):
            twice, _ = Counter(self.tokens).most_common(1)[0]
            raise ValueError(f"a vocabulary has each token once, but {twice!r} is there several times")

    @classmethod
    def of(cls, texts, level="word", *, size=None, min_count=1, special=(PADDING, UNKNOWN), grid=None):
        """The vocabulary of some texts: first the special tokens, then the most frequent ones, equally frequent ones in order.

        Parameters
        ----------
        texts : iterable of str
        level : "word" or "character"
        size : int, optional
            Number of tokens at most, the special ones included.
        min_count : int
            Tokens that occur less often are left out.
        special : sequence of str
            PADDING, UNKNOWN, both or none.
        grid : mpiml.parallel.Grid, optional
            With it, each rank gives its own share of the texts (none, even), and all get the vocabulary of all texts; to be
            called on all ranks together. Without it the ranks get the same vocabulary if they have the same texts.

        Raises
        ------
        ValueError
            No token is left.
        """
        for name, value in ("min_count", min_count), ("size", len(special) + 1 if size is None else size):
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is a whole number above 0, not {value!r}")
        grid, cut = grid or Alone(), _cutter(level)
        grid.same("level, size, min_count and special of a vocabulary", (level, size, min_count, tuple(special)))
        mine, counts = Counter(), Counter()
        for text in grid.together("reading the texts", list, _all_texts(texts)):
            mine.update(cut(text))
        for text in grid.texts(json.dumps(mine)):
            counts.update(json.loads(text))
        found = sorted((-count, token) for token, count in counts.items() if count >= min_count and token not in special)
        tokens = [*special, *(token for _, token in found)][:size]
        if len(tokens) <= len(special):
            raise ValueError(f"of {len(counts)} different {level}s none is left for the vocabulary (min_count={min_count}, "
                             f"size={size})")
        return cls(tokens, level)

    def __len__(self):
        return len(self.tokens)

    def __repr__(self):
        return f"Vocabulary of {len(self)} {self.level}s"

    def ids(self, text):
        """The ids of a text's tokens, as an array (tokens,) of int64.

        Raises
        ------
        ValueError
            A token is unknown, and the vocabulary has none for such.
        """
        tokens = self._cut(text)
        unknown = self._ids.get(UNKNOWN)
        ids = [self._ids.get(token, unknown) for token in tokens]
        if unknown is None and None in ids:
            at = ids.index(None)
            raise ValueError(f"the {self.level} {tokens[at]!r}, number {at + 1} of a text, is not among the {len(self)} of the "
                             f"vocabulary: leave it out, or make the vocabulary of texts that have it, or with UNKNOWN")
        return np.array(ids, np.int64)

    def encode(self, texts, length):
        """The ids of texts as rows of an array (n, length) of int64: long texts lose their ends, short ones are padded there.

        Raises
        ------
        ValueError
            As for :meth:`ids`; or a text is short, and the vocabulary has no padding.
        """
        if not isinstance(length, (int, np.integer)) or length < 1:
            raise ValueError(f"length is a number of tokens, a whole number above 0, not {length!r}")
        texts = list(_all_texts(texts))
        rows = np.full((len(texts), length), self._ids.get(PADDING, -1))
        for row, text in zip(rows, texts, strict=True):
            ids = self.ids(text)[:length]
            row[:len(ids)] = ids
        if len(rows) and rows.min() < 0:
            short = int(np.flatnonzero(rows.min(axis=1) < 0)[0])
            raise ValueError(f"text {short} is shorter than {length} {self.level}s, and the vocabulary has no PADDING")
        return rows

    def decode(self, ids):
        """The text of ids (tokens,), without padding; between words one space."""
        return (" " if self.level == "word" else "").join(filter(None, (self.tokens[i] for i in ids)))

    def settings(self):
        """What :meth:`from_settings` needs, as JSON can carry it."""
        return {"level": self.level, "tokens": self.tokens}

    @classmethod
    def from_settings(cls, settings):
        return cls(settings["tokens"], settings["level"])


class TextFeatures:
    """What a model is given of the texts in a table: the ids of their tokens.

    Made by :meth:`fit` from the rows for training, and saved with the model, so that new rows are encoded alike.

    Parameters
    ----------
    columns : sequence of str
        Their texts are joined, a space between them.
    vocabulary : Vocabulary
    length : int
        Tokens of each row: longer texts lose their ends, shorter ones are padded there.

    Examples
    --------
    >>> from mpiml.data import Table
    >>> table = Table({"title": ["Rain", "Sun", ""], "text": ["in Rome", "in Oslo", "Sun"]})
    >>> features = TextFeatures.fit(table, ["title", "text"], length=4)
    >>> features.vocabulary.tokens[2:], features.encode(table).tolist()
    (['in', 'sun', 'oslo', 'rain', 'rome'], [[5, 2, 6, 0], [3, 2, 4, 0], [3, 0, 0, 0]])
    """

    def __init__(self, columns, vocabulary, length):
        self.columns, self.vocabulary, self.length = list(columns), vocabulary, length

    @classmethod
    def fit(cls, table, columns, length, grid=None, **options):
        """With the vocabulary of a table, of all ranks together; ``options`` are those of :meth:`Vocabulary.of`."""
        columns = list(columns)
        return cls(columns, Vocabulary.of(_joined(table, columns), grid=grid, **options), length)

    def encode(self, table):
        """The ids of each row's tokens, int64 (n, length); other columns are left out.

        Raises
        ------
        ValueError
            A column is missing.
        """
        return self.vocabulary.encode(_joined(table, self.columns), self.length)

    def settings(self):
        """What :meth:`from_settings` needs, as JSON can carry it."""
        return {"kind": "text", "columns": self.columns, "length": self.length, **self.vocabulary.settings()}

    @classmethod
    def from_settings(cls, settings):
        return cls(settings["columns"], Vocabulary.from_settings(settings), settings["length"])


def _joined(table, columns):
    return [" ".join(filter(None, parts)) for parts in zip(*(table[name] for name in columns), strict=True)]


def _all_texts(texts):
    if isinstance(texts, str):
        raise TypeError("texts is a list of texts: give [text] for a single one")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is {text!r}, not a str: give '' for a text that is missing")
        yield text


def windows(ids, length, step=None):
    """A long sequence as samples of the task to tell the next token: x (n, length), and y, the same one token later.

    Parameters
    ----------
    ids : array (tokens,)
    length : int
    step : int, optional
        From the beginning of one window to that of the next; by default they follow each other without an overlap, so that
        an epoch is one pass through the text. With half of ``length`` an epoch is two passes, cut at different places.

    Returns
    -------
    x, y : arrays (n, length)
        Views of ``ids``, which take no memory.

    Raises
    ------
    ValueError
        There are too few tokens for a window.

    Examples
    --------
    >>> x, y = windows(np.arange(8), length=3)
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    step = length if step is None else step
    for name, value in ("length", length), ("step", step):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} is a number of tokens, a whole number above 0, not {value!r}")
    if len(ids) <= length:
        raise ValueError(f"a text of {len(ids)} tokens is too short for windows of {length}: it takes {length + 1} at least")
    return tuple(np.lib.stride_tricks.sliding_window_view(part, length)[::step] for part in (ids[:-1], ids[1:]))
