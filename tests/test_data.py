"""Reading data sets, in all the ways in which they can be missing or broken, and sharing them in batches."""

import gzip
import hashlib
import http.server
import itertools
import socket
import struct
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from mpiml.data import batches, digits, download, mnist, pixels, read_idx, share

IDX_TYPES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def header(kind, *shape):
    return bytes([0, 0, IDX_TYPES[kind], len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def idx(array):
    """The IDX file of an array, as bytes."""
    kind = array.dtype.str[1:]
    return header(kind, *array.shape) + array.astype(f">{kind}").tobytes()


def write(path, data):
    path.write_bytes(data)
    return path


# --- IDX files ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", IDX_TYPES)
def test_read_idx(kind, pack, tmp_path):
    array = np.arange(-6, 18).astype(kind).reshape(2, 3, 4)
    read = read_idx(write(tmp_path / "file", pack(idx(array))))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype and read.dtype.isnative and read.flags.writeable


GOOD = idx(np.arange(12, dtype="u1").reshape(3, 4))
BROKEN = {
    "empty": (b"", r"is not an IDX file: it starts with the bytes \(none\)"),
    "foreign": (b"\x89PNG\r\n", "is not an IDX file: it starts with the bytes 89 50 4e 47"),
    "type": (b"\0\0\x0a\1" + GOOD[4:], "is not an IDX file: it starts with the bytes 00 00 0a 01"),
    "no axes": (b"\0\0\x08\0" + b"1", "is not an IDX file: it starts with the bytes 00 00 08 00"),
    "255 axes": (b"\0\0\x08\xff" + 255 * b"\0\0\0\1" + b"1", "is not an IDX file: it starts with the bytes 00 00 08 ff"),
    "header": (GOOD[:9], "is truncated: its header should have 12 bytes, not 9"),
    "data": (GOOD[:-1], r"is truncated: its header says 12 bytes for the shape \(3, 4\), but there are 11"),
    "no data": (GOOD[:12], r"is truncated: its header says 12 bytes for the shape \(3, 4\), but there are 0"),
    "trailing": (GOOD + b"\0", r"is longer: its header says 12 bytes for the shape \(3, 4\), but more follow"),
    "no samples": (header("u1", 0, 28), r"claims the shape \(0, 28\), 0 bytes"),
    "10^12 bytes": (header("u1", 10**6, 10**6) + b"123", r"claims the shape \(1000000, 1000000\), 1000000000000 bytes"),
    "10^77 bytes": (header("f8", *8 * [2**32 - 1]), r"claims the shape \(4294967295, .*: its header is damaged"),
    "8 GB": (header("f8", 10**9) + b"123", r"is truncated: its header says 8000000000 bytes .* there are 3"),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_idx_file(case, pack, tmp_path):
    data, message = BROKEN[case]
    path = write(tmp_path / "some-file", pack(data))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"some-file {message}"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6  # a lie about the size must not allocate it
    finally:
        tracemalloc.stop()


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1:]


PACKED = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, 5000, "u1")))


@pytest.mark.parametrize("data", [PACKED[:-8], PACKED[:2500], PACKED[:2], PACKED[:11], flipped(PACKED, -5 % len(PACKED)),
                                  flipped(PACKED, -1 % len(PACKED)), PACKED + b"more", flipped(PACKED, 2)],
                         ids=["end", "middle", "magic", "header", "checksum", "size", "trailing", "method"])
def test_a_broken_gzip_file(data, tmp_path):
    with pytest.raises(ValueError, match=r"some\.gz is a damaged or truncated gzip file \(.+\): fetch it again"):
        read_idx(write(tmp_path / "some.gz", data))


def test_a_missing_idx_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_idx(tmp_path / "nowhere")


# --- MNIST from a folder --------------------------------------------------------------------------------------

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
module = sys.modules[mnist.__module__]  # the function hides it in mpiml.data


def small(labels=(3, 1, 4, 1, 5, 9)):
    """{name: array} of a data set in the shape of MNIST: six images to train with and four to test."""
    rng = np.random.default_rng(1)
    x, x_test = (rng.integers(0, 256, (n, 4, 5), "u1") for n in (6, 4))
    return dict(zip(NAMES, (x, np.array(labels, "u1"), x_test, np.array([2, 7, 1, 8], "u1")), strict=True))


def store(folder, arrays, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        write(folder / (name + ".gz" * packed), gzip.compress(idx(array)) if packed else idx(array))
    return folder


def check(data, arrays):
    (x, y), (x_test, y_test) = data
    for images, labels, name in (x, y, "train"), (x_test, y_test, "t10k"):
        np.testing.assert_array_equal(images, arrays[f"{name}-images-idx3-ubyte"][:, None])
        np.testing.assert_array_equal(labels, arrays[f"{name}-labels-idx1-ubyte"])
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No data of the developer's and no server; a cache of the test's own."""
    monkeypatch.delenv("MPIML_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "MIRRORS", ())
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["argument", "variable", "subfolder"])
def test_mnist_from_a_folder(place, packed, tmp_path, monkeypatch):
    arrays = small()
    store(tmp_path / "my" / ("mnist" if place == "subfolder" else ""), arrays, packed)
    if place == "argument":
        check(mnist(tmp_path / "my"), arrays)
    else:
        monkeypatch.setenv("MPIML_DATA", str(tmp_path / "my"))
        check(mnist(), arrays)


def test_the_argument_goes_before_the_variable(tmp_path, monkeypatch):
    arrays = small(labels=(0, 0, 0, 0, 0, 0))
    monkeypatch.setenv("MPIML_DATA", str(store(tmp_path / "variable", small())))
    check(mnist(store(tmp_path / "argument", arrays)), arrays)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_lacks_a_file(name, tmp_path):
    folder = store(tmp_path / "my", small())
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"my has neither {name} nor {name}\.gz: .*--data or MPIML_DATA"):
        mnist(folder)


def test_a_named_folder_is_never_replaced(tmp_path, monkeypatch):
    store(tmp_path / "cache" / "mpiml" / "mnist", small(), packed=True)
    with pytest.raises(FileNotFoundError, match="elsewhere has neither"):
        mnist(tmp_path / "elsewhere")
    monkeypatch.setenv("MPIML_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere has neither"):
        mnist()


def swapped(arrays):
    a, b, *_ = NAMES
    return arrays | {a: arrays[b], b: arrays[a]}


WRONG = {
    "label 10": (lambda a: small(labels=(3, 1, 10, 1, 5, 9)),
                 r"train-labels-idx1-ubyte holds the label 10 at position 2: digits run from 0 to 9"),
    "label -1": (lambda a: a | {NAMES[3]: np.array([2, 7, -1, 8], "i1")},
                 r"t10k-labels-idx1-ubyte holds an array of shape \(4,\) and dtype int8, not labels \(4,\) of uint8"),
    "count": (lambda a: a | {NAMES[1]: a[NAMES[1]][:5]},
              r"train-labels-idx1-ubyte holds .* shape \(5,\) .*, not labels \(6,\) of uint8 for the images in train-images"),
    "swapped": (swapped, r"train-images-idx3-ubyte holds an array of shape \(6,\) and dtype uint8, not images"),
    "float": (lambda a: a | {NAMES[2]: a[NAMES[2]].astype("f4")},
              r"t10k-images-idx3-ubyte holds an array of shape \(4, 4, 5\) and dtype float32, not images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_not_what_they_are_called(case, tmp_path):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        mnist(store(tmp_path / "my", change(small())))


def test_the_real_mnist(mnist_folder):
    (x, y), (x_test, y_test) = mnist(mnist_folder)
    assert (x.shape, x_test.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert np.bincount(y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(pixels(x).mean()) < 1e-3 and abs(pixels(x).std() - 1) < 1e-3


# --- MNIST from the network -----------------------------------------------------------------------------------

@pytest.fixture
def server(monkeypatch):
    """A server of a small MNIST; the first part of a path says how it behaves. ``server.log`` is what it was asked."""
    arrays = small()
    files = {f"{name}.gz": gzip.compress(idx(array), mtime=0) for name, array in arrays.items()}
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(b"")

        def do_GET(self):
            data = files[self.path.rsplit("/", 1)[1]]
            self.answer({"wrong": data + b"!", "dies": data[:len(data) // 2]}.get(self.path.split("/")[1], data))

        def answer(self, data):
            how, name = self.path.strip("/").split("/")
            server.log.append((self.command, how, name))
            if how == "silent" or (how == "stops" and self.command == "GET"):
                done.wait(30)
                return
            self.send_response(404 if how == "lacks" else 200)
            self.send_header("Content-Length", str(len(files[name]) + (how == "wrong")))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.log, server.arrays = [], arrays
    monkeypatch.setattr(module, "FILES", {name: hashlib.md5(data).hexdigest()  # noqa: S324
                                          for name, data in files.items()})
    monkeypatch.setattr(download, "PATIENCE", 0.5)

    def mirrors(*ways):
        monkeypatch.setattr(module, "MIRRORS", [f"http://127.0.0.1:{server.server_port}/{way}/" for way in ways])

    server.mirrors = mirrors
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    done.set()
    server.shutdown()
    server.server_close()
    thread.join()


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def is_digits(data):
    return data[0][0].shape == (1500, 1, 8, 8)


def test_download(server, tmp_path, capsys):
    server.mirrors("good")
    check(mnist(), server.arrays)
    assert cached(tmp_path) == sorted(f"{name}.gz" for name in NAMES)
    asked = len(server.log)
    check(mnist(), server.arrays)
    assert len(server.log) == asked == 5  # the second time it came from the cache
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("way", ["wrong", "dies", "silent", "stops", "lacks"])
def test_the_second_mirror_helps(way, server, tmp_path, capsys):
    server.mirrors(way, "good")
    start = time.perf_counter()
    check(mnist(), server.arrays)
    assert time.perf_counter() - start < 15
    assert (server.log[0][1], server.log[-1][1]) == (way, "good")
    assert cached(tmp_path) == sorted(f"{name}.gz" for name in NAMES)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("way, reason", [("wrong", "MD5 hash"), ("dies", "IncompleteRead"), ("stops", "Read timed out"),
                                         ("silent", "no server answered"), ("lacks", "no server answered")])
def test_no_mirror_helps(way, reason, server, tmp_path, capsys):
    server.mirrors(way)
    start = time.perf_counter()
    assert is_digits(mnist())
    assert time.perf_counter() - start < 15
    assert cached(tmp_path) == []
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("mpiml: MNIST is not at hand (") and reason in err and "MPIML_DATA" in err


def test_nobody_listens(tmp_path, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(module, "MIRRORS", [f"http://127.0.0.1:{free.getsockname()[1]}/"])
        assert is_digits(mnist())
    assert capsys.readouterr().err.startswith("mpiml: MNIST is not at hand (no server answered): using the 1,797 digits")


def test_no_room_for_the_cache(server, tmp_path, capsys):
    server.mirrors("good")
    write(tmp_path / "cache", b"a file where the folder should be")
    assert is_digits(mnist())
    assert capsys.readouterr().err.count("\n") == 1


def test_pooch_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert is_digits(mnist())
    assert "downloading needs pooch: pip install 'mpiml[examples]'" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_take_digits_where_one_node_has_no_mnist(rank, tmp_path, capsys):
    store(tmp_path / "cache" / "mpiml" / "mnist", small(), packed=True)
    grid = SimpleNamespace(rank=rank, once_per_node=lambda function: function(), all=lambda flag: False,
                           arrays_once_per_node=lambda function, *args: function(*args), same=lambda what, value: None)
    assert is_digits(mnist(grid=grid))
    assert capsys.readouterr().err.count("another node could not get it") == (rank == 0)
    grid.all = bool
    check(mnist(grid=grid), small())


def test_digits():
    (x, y), (x_test, y_test) = digits()
    assert (x.shape, x_test.shape) == ((1500, 1, 8, 8), (297, 1, 8, 8))
    assert (x.dtype, y.dtype, x_test.dtype, y_test.dtype) == (np.uint8, np.int64, np.uint8, np.int64)
    assert set(y) == set(y_test) == set(range(10))
    assert (x.min(), x.max()) == (0, 255)


def test_digits_are_those_of_scikit_learn():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    (x, y), (x_test, y_test) = digits()
    expected = sorted((np.rint(image * 255 / 16).astype(int).ravel().tolist(), label)
                      for image, label in zip(data.images, data.target.tolist(), strict=True))
    found = zip(np.concatenate([x, x_test]).reshape(-1, 64).tolist(), [*y.tolist(), *y_test.tolist()], strict=True)
    assert sorted(found) == expected


def test_pixels():
    images = np.array([[0, 255]], np.uint8)
    assert pixels(images).dtype == np.float32
    np.testing.assert_allclose(pixels(images), (images / 255 - 0.13066) / 0.30811, rtol=1e-4)


# --- Batches --------------------------------------------------------------------------------------------------

def grid(rank, ranks):
    return SimpleNamespace(replica=rank, data=ranks, lanes=None, pipe=1, undone=0, generation=0, same=lambda what, value: None)


def epoch(ranks, n, size, **options):
    """[[the numbers of the samples in each rank's share] for each batch]; x and y are checked to agree."""
    x, y = np.arange(n)[:, None] * np.ones(3), np.arange(n)
    shares = [list(batches(x, y, size, grid=grid(rank, ranks), **options)) for rank in range(ranks)]
    for mine in shares:
        for images, labels in mine:
            np.testing.assert_array_equal(images, labels[:, None] * np.ones(3))
    return [[labels.tolist() for _, labels in batch] for batch in zip(*shares, strict=True)]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n, size", [(8, 8), (100, 8), (101, 16), (97, 13), (10, 64)])
def test_every_sample_is_used_once(ranks, n, size):
    shares = epoch(ranks, n, size, epoch=3, seed=5)
    assert sorted(joined(joined(shares))) == list(range(n))
    assert len(shares) == len(batches(np.zeros(n), np.zeros(n), size)) == -(-n // size)
    # The ranks only cut the batch: together, in the order of the ranks, they hold what one rank would.
    assert [[joined(batch)] for batch in shares] == epoch(1, n, size, epoch=3, seed=5)
    for batch in shares:
        lengths = [len(part) for part in batch]
        assert max(lengths) - min(lengths) <= 1


def test_a_last_batch_that_is_smaller_than_the_ranks():
    *_, last = epoch(8, 19, 8)
    assert sorted(map(len, last)) == [0, 0, 0, 0, 0, 1, 1, 1]
    x, y = list(batches(np.zeros((9, 2), np.float32), np.zeros(9, int), 8, grid=grid(0, 8)))[-1]
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((0, 2), np.float32, (0,), np.dtype(int))


def test_a_batch_comes_again_if_its_step_was_undone_and_only_then():
    smaller = grid(0, 4)
    seen = []
    for _, y in batches(np.zeros(24), np.arange(24), 8, shuffle=False, grid=smaller):
        seen.append(y.tolist())
        if len(seen) == 1:
            smaller.data = 2  # lost elsewhere, after the step
        if len(seen) == 2:
            smaller.data, smaller.undone = 1, 1  # lost in the step
    assert seen == [[0, 1], [8, 9, 10, 11], list(range(8, 16)), list(range(16, 24))]


def test_the_order_depends_on_seed_and_epoch_alone():
    first = epoch(1, 50, 50, seed=1, epoch=2)
    np.random.seed(0)  # noqa: NPY002  (it must not matter)
    assert epoch(1, 50, 50, seed=1, epoch=2) == first
    assert joined(joined(epoch(1, 50, 7, seed=1, epoch=2))) == first[0][0]
    assert epoch(1, 50, 50, seed=1, epoch=3) != first != epoch(1, 50, 50, seed=2, epoch=2)
    assert epoch(1, 50, 50, shuffle=False) == [[list(range(50))]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("n, size", [(64, 16), (61, 20), (13, 16)])
def test_shares_start_at_a_multiple(ranks, n, size):
    shares = epoch(ranks, n, size, multiple=4)
    assert [[joined(batch)] for batch in shares] == epoch(1, n, size)
    for batch in shares:
        starts = np.cumsum([0] + [len(part) for part in batch])[:-1]
        assert not any(start % 4 for start, part in zip(starts, batch, strict=True) if part)


def test_share_is_a_partition():
    for n in range(30):
        for ranks in range(1, 9):
            for multiple in 1, 2, 5:
                cuts = [share(n, rank, ranks, multiple) for rank in range(ranks)]
                assert [0] + [stop for _, stop in cuts] == [start for start, _ in cuts] + [n]


@pytest.mark.parametrize("n, labels, ranks, options, message", [
    (0, 0, 1, {"size": 4}, "the data set is empty"),
    (0, 0, 4, {"size": 4}, "the data set is empty"),
    (3, 3, 4, {"size": 4}, "3 samples cannot be shared by 4 ranks: .* use 3 ranks at most"),
    (10, 10, 4, {"size": 3}, "a batch of 3 cannot be shared by 4 ranks .* use a size of 4 at least"),
    (10, 10, 2, {"size": 7, "multiple": 4}, "a batch of 7 cannot be shared by 2 ranks in multiples of 4: use a size of 8"),
    (10, 9, 1, {"size": 4}, "x has 10 samples but y has 9"),
    (10, 10, 1, {"size": 0}, "size is a number of samples, a whole number above 0, not 0"),
    (10, 10, 1, {"size": -4}, "size is a number of samples, a whole number above 0, not -4"),
    (10, 10, 1, {"size": 2.5}, "size is a number of samples, a whole number above 0, not 2.5"),
    (10, 10, 1, {"size": "4"}, "size is a number of samples, a whole number above 0, not '4'"),
    (10, 10, 1, {"size": 4, "multiple": 0}, "multiple is a number of samples, a whole number above 0, not 0"),
])
def test_batches_that_cannot_be(n, labels, ranks, options, message):
    with pytest.raises(ValueError, match=message):
        batches(np.zeros(n), np.zeros(labels), grid=grid(0, ranks), **options)


def test_ranks_compare_what_they_ask_for():
    asked = []

    def same(what, value):
        if what == "what the batches are made of":
            asked.append(value)

    ranks = SimpleNamespace(replica=0, data=1, lanes=None, pipe=1, undone=0, generation=0, same=same)
    base = {"size": 4, "epoch": 0, "seed": 0, "shuffle": True, "multiple": 1}
    for change in {}, {"size": 5}, {"epoch": 1}, {"seed": 1}, {"shuffle": False}, {"multiple": 2}:
        batches(np.zeros(8), np.zeros(8), grid=ranks, **(base | change))
    batches(np.zeros(9), np.zeros(9), grid=ranks, **base)
    batches(np.zeros(8), np.zeros(8), grid=ranks, **(base | {"size": np.int64(4)}))
    assert len(set(map(repr, asked))) == 7 and repr(asked[-1]) == repr(asked[0])


@pytest.mark.parametrize("mine", [np.ones((9, 2)), np.arange(18.0).reshape(9, 2)])
def test_ranks_compare_some_of_the_data(mine):
    said = {}
    ranks = SimpleNamespace(replica=0, data=1, lanes=None, pipe=1, undone=0, generation=0, same=said.__setitem__)
    digests = []
    for x in np.ones((9, 2)), mine:
        batches(x, np.arange(9), 4, grid=ranks)
        digests.append(next(value for what, value in said.items() if "grid.rows" in what))
    assert (digests[0] == digests[1]) == (mine == 1).all()


def test_transform_and_mapped_memory(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(40, dtype=np.uint8).reshape(10, 4))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    shapes = []

    def halve(part):
        shapes.append(part.shape)
        return part.astype(np.float32) / 2

    pairs = list(batches(x, np.arange(10), 4, grid=grid(1, 2), transform=halve))
    assert shapes == [(2, 4), (2, 4), (1, 4)]
    for part, labels in pairs:
        assert type(part) is np.ndarray and part.dtype == np.float32
        np.testing.assert_array_equal(part, x[labels] / 2)
