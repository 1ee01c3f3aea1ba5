"""Where a public data set lies: in a folder that the user names, in the cache, or on the network."""

import os
import sys
import threading
from pathlib import Path

PATIENCE = 5.0  # seconds until a silent server counts as unreachable


def locate(names, fetch, folder=None, grid=None):
    """The folder of a data set: ``folder``, else the one that MPIML_DATA names, else what ``fetch`` returns.

    A folder that was named is never replaced by anything else.

    Parameters
    ----------
    names : tuple of str
        The data set, and the names of a subfolder of the named folder in which it may lie.
    fetch : function
        Returns (folder, None), or (None, why it cannot be had); called on one rank of each node.
    folder : path, optional
    grid : mpiml.parallel.Grid, optional
        The ranks that load together.

    Returns
    -------
    (Path, None) or (None, reason)
        On all ranks the one, or on all the other.
    """
    folder = folder or os.environ.get("MPIML_DATA")
    if grid:  # some launchers do not hand the variable on to other nodes
        grid.same(f"whether a folder with {names[0]} was named, by argument or MPIML_DATA,", bool(folder))
    if folder:
        inside = [path for name in names if (path := Path(folder, name)).is_dir()]
        return (inside or [Path(folder)])[0], None
    cache, problem = grid.once_per_node(fetch) if grid else fetch()
    reached = grid.all(cache is not None) if grid else cache is not None
    return (Path(cache), None) if reached else (None, problem or "another node could not get it")


def cache_folder(name):
    """The folder of the user's cache that the data set ``name`` is downloaded to."""
    import pooch
    return Path(pooch.os_cache("mpiml")) / name


def download(name, files, mirrors, unpack=None, made=(), size=None):
    """Download a data set into the user's cache, unless it is there.

    Parameters
    ----------
    name : str
        Its folder in the cache.
    files : {name: MD5}
    mirrors : list of str
        Addresses under which the files may lie; the first that works is taken.
    unpack : function of the folder, optional
        Called when the files are there; what it makes of them is ``made``.
    made : tuple of str
        Files that are wanted in the end; by default those that are downloaded.
    size : str, optional
        How much it is: told to the user, who may have to wait.

    Returns
    -------
    (folder, None) or (None, reason)
        If no server could be reached within seconds, or the files could not be stored, why.
    """
    try:
        import pooch
        import requests
    except ImportError:
        return None, "downloading needs pooch: pip install 'mpiml[examples]'"
    folder = cache_folder(name)
    if all((folder / file).is_file() for file in made or files):
        return str(folder), None
    pooch.get_logger().setLevel("WARNING")
    problem = "no server answered"
    for mirror in mirrors:
        if not _answers(mirror + next(iter(files)), requests):
            continue
        if size:
            print(f"mpiml: downloading {name}, {size}, from {mirror} to {folder}", file=sys.stderr, flush=True)
        store = pooch.create(folder, mirror, registry={file: f"md5:{md5}" for file, md5 in files.items()})
        try:
            for file in files:  # each to a temporary file, which is then checked and renamed
                store.fetch(file, downloader=pooch.HTTPDownloader(timeout=PATIENCE))
            if unpack:
                unpack(folder)
        except (OSError, ValueError) as error:  # unreachable or no space, or another checksum
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            return str(folder), None
    return None, problem


def _answers(url, requests):
    # In a thread, since the look-up of a host name has no time limit of its own.
    answered = []

    def ask():
        try:
            answered.append(requests.head(url, timeout=PATIENCE, allow_redirects=True).ok)
        except Exception:  # also what requests lets through, of a wrong certificate path or proxy, say
            answered.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answered == [True]
