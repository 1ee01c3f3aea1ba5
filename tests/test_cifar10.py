"""CIFAR-10, in all the ways in which it can be missing or broken."""

import functools
import hashlib
import http.server
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from launch import ROOT, environment, mpirun

from mpiml.data import cifar10, colors

module = sys.modules[cifar10.__module__]  # the function hides it in mpiml.data
NAMES = (*module.TRAIN, module.TEST)


def records(n, seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (n, 3073), "u1")
    rows[:, 0] = rng.integers(0, 10, n)
    return rows


def small(*names):
    """{name: records} of a data set in the form of CIFAR-10, with a few images."""
    return {name: records(3 + number, number) for number, name in enumerate(names or NAMES)}


def store(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / name).write_bytes(bytes(rows))
    return folder


def check(data, files):
    (x, y), (x_test, y_test) = data
    train = np.concatenate([rows for name, rows in files.items() if name != "test_batch.bin"])
    for images, labels, rows in (x, y, train), (x_test, y_test, files["test_batch.bin"]):
        np.testing.assert_array_equal(images, rows[:, 1:].reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(labels, rows[:, 0])
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64) and images.flags.writeable


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No data of the developer's and no server; a cache of the test's own."""
    monkeypatch.delenv("MPIML_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "MIRRORS", ())
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)


@pytest.mark.parametrize("place", ["argument", "variable", "cifar10", "cifar-10-batches-bin"])
def test_from_a_folder(place, tmp_path, monkeypatch):
    files = small()
    store(tmp_path / "my" / ("" if place in ("argument", "variable") else place), files)
    if place == "argument":
        check(cifar10(tmp_path / "my"), files)
    else:
        monkeypatch.setenv("MPIML_DATA", str(tmp_path / "my"))
        check(cifar10(), files)


def test_as_many_files_as_there_are(tmp_path):
    files = small("data_batch_2.bin", "data_batch_5.bin", "test_batch.bin")
    check(cifar10(store(tmp_path, files)), files)


@pytest.mark.parametrize("names, missing", [
    (NAMES[:-1], "test_batch.bin"), (NAMES[-1:], r"any of data_batch_1.bin to data_batch_5.bin"),
    (["else"], r"any of data_batch_1.bin to data_batch_5.bin and test_batch.bin")], ids=["test", "train", "all"])
def test_a_folder_that_lacks_files(names, missing, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"my lacks {missing}: name the folder .* --data or MPIML_DATA"):
        cifar10(store(tmp_path / "my", small(*names)))


def with_label(label, record):
    rows = records(5, 9)
    rows[record, 0] = label
    return rows


BROKEN = {
    "empty": (b"", "is empty: it should hold records of 3073 bytes"),
    "cut": (bytes(records(3, 0))[:-1000], r"is cut short, or of another format: record 2 \(byte 6146\) has 2073 of 3073 bytes"),
    "longer": (bytes(records(3, 0)) + b"1", r"is cut short, or of another format: record 3 \(byte 9219\) has 1 of 3073 bytes"),
    "label": (with_label(10, 3), r"has the label 10 in record 3 \(byte 9219\): labels run from 0 to 9"),
    "label 255": (with_label(255, 0), r"has the label 255 in record 0 \(byte 0\)"),
}


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file(case, name, tmp_path):
    data, message = BROKEN[case]
    with pytest.raises(ValueError, match=f"{name} {message}"):
        cifar10(store(tmp_path, small() | {name: data}))


def test_the_real_photographs():
    folder = os.path.join(DATA, "cifar10")
    if not os.path.isdir(folder):
        pytest.skip("MPIML_DATA names no folder with CIFAR-10")
    (x, y), (x_test, y_test) = cifar10(folder)
    assert x.shape[1:] == x_test.shape[1:] == (3, 32, 32) and len(x) % 10_000 == 0
    assert set(np.bincount(y)) == {len(x) // 10} and set(np.bincount(y_test)) == {len(x_test) // 10}
    prepared = colors(x[:5000])
    assert abs(prepared.mean(axis=(0, 2, 3))).max() < 0.02 and abs(prepared.std(axis=(0, 2, 3)) - 1).max() < 0.02


DATA = os.environ.get("MPIML_DATA", "")


# --- From the network -----------------------------------------------------------------------------------------

def archive(path, files, **others):
    """The archive of CIFAR-10, and in it what else a hostile one might have."""
    with tarfile.open(path, "w:gz") as tar:
        for name, rows in {**{f"{module.FOLDER}/{name}": bytes(rows) for name, rows in files.items()}, **others}.items():
            member = tarfile.TarInfo(name)
            member.size = len(rows)
            tar.addfile(member, io.BytesIO(rows))
    return path


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """``serve(files, **others)`` lets a server have such an archive."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path / "server"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setattr(module, "MIRRORS", (f"http://127.0.0.1:{server.server_port}/",))

    def serve(files, **others):
        path = archive(folder / "cifar-10-binary.tar.gz", files, **others)
        monkeypatch.setattr(module, "ARCHIVE", {path.name: hashlib.md5(path.read_bytes()).hexdigest()})  # noqa: S324
        return path

    yield serve
    server.shutdown()
    server.server_close()
    thread.join()


def cached(tmp_path):
    return sorted(str(path.relative_to(tmp_path / "cache" / "mpiml")) for path in (tmp_path / "cache").rglob("*")
                  if path.is_file())


def test_download(serve, tmp_path, capsys):
    files = small()
    path = serve(files)
    check(cifar10(), files)
    assert capsys.readouterr().err.startswith("mpiml: downloading cifar10, 170 MB, from http://127.0.0.1:")
    path.unlink()
    check(cifar10(), files)  # the second time it came from the cache
    assert cached(tmp_path) == sorted(f"cifar10/{name}" for name in NAMES)
    assert capsys.readouterr() == ("", "")


def test_an_archive_says_not_where_its_files_go(serve, tmp_path):
    files = small()
    serve(files, **{"../../evil": b"evil", str(tmp_path / "evil"): b"evil", f"{module.FOLDER}/readme.html": b"text"})
    check(cifar10(), files)
    assert cached(tmp_path) == sorted(f"cifar10/{name}" for name in NAMES)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("files, reason", [(small(*NAMES[1:]), "is not the archive of CIFAR-10: .*data_batch_1.bin"),
                                           ({}, "is not the archive of CIFAR-10")], ids=["member", "empty"])
def test_an_archive_that_lacks_files(files, reason, serve, tmp_path):
    serve(files)
    with pytest.raises(FileNotFoundError, match=rf"CIFAR-10 is not at hand \(ValueError: .*{reason}"):
        cifar10()


def test_another_checksum(serve, tmp_path):
    path = serve(small())
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not at hand \(ValueError: MD5 hash .*\): download cifar"):
        cifar10()
    assert cached(tmp_path) == []


def test_nobody_listens(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(module, "MIRRORS", [f"http://127.0.0.1:{free.getsockname()[1]}/"])
        with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not at hand \(no server answered\): download "
                           r"cifar-10-binary\.tar\.gz from http.*, unpack it, and name the folder by cifar10\(FOLDER\), --data "
                           r"FOLDER or MPIML_DATA"):
            cifar10()


def test_one_node_cannot_get_it(tmp_path):
    store(tmp_path / "cache" / "mpiml" / "cifar10", small())
    grid = SimpleNamespace(rank=0, once_per_node=lambda function: function(), all=lambda flag: False,
                           same=lambda what, value: None)
    with pytest.raises(FileNotFoundError, match="another node could not get it"):
        cifar10(grid=grid)


def test_a_member_that_is_no_file(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(f"{module.FOLDER}/data_batch_1.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ValueError, match="is not the archive of CIFAR-10"):
        module._unpack(tmp_path)
    assert not (tmp_path / "data_batch_1.bin").exists()


# --- The example ----------------------------------------------------------------------------------------------

def few(folder):
    """A CIFAR-10 of 48 and 16 images in which the class can be seen in the brightness."""
    rng = np.random.default_rng(0)
    files = {}
    for name, n in ("data_batch_1.bin", 48), ("test_batch.bin", 16):
        labels = rng.integers(0, 10, (n, 1))
        files[name] = np.concatenate([labels, labels * 25 + rng.integers(0, 20, (n, 3072))], axis=1).astype("u1")
    return store(folder, files)


@pytest.mark.launch
def test_the_example_gives_the_same_bits_on_one_rank_and_on_two(tmp_path):
    few(tmp_path)
    outs = []
    for ranks in 1, 2:
        run = mpirun(ranks, "examples/cifar10.py", "--data", str(tmp_path), "--epochs", "1", "--batch", "32", "--lanes", "2")
        assert run.code == 0, run.err
        outs.append(run.out.splitlines()[-2:])
    assert outs[0] == outs[1] and outs[0][0].startswith("weights ") and outs[0][1].startswith("accuracy ")


@pytest.mark.launch
def test_the_example_says_what_it_lacks(tmp_path):
    run = subprocess.run([sys.executable, "examples/cifar10.py"], cwd=ROOT, capture_output=True, text=True, timeout=60,
                         env=environment(XDG_CACHE_HOME=str(tmp_path), HTTPS_PROXY="http://127.0.0.1:9"))
    assert run.returncode and "FileNotFoundError: CIFAR-10 is not at hand (no server answered): download" in run.stderr
