"""Where the files of a data set are."""

import os
from pathlib import Path


def find(name, folder=None):
    """The path of a file in a folder, or in a folder in it.

    Parameters
    ----------
    name : str
    folder : path, optional
        By default the one that the variable ``MPIML_DATA`` names.

    Raises
    ------
    FileNotFoundError
        It is not there, or no folder was named.
    """
    folder = folder or os.environ.get("MPIML_DATA")
    if not folder:
        raise FileNotFoundError(f"which folder holds {name}? Name it by --data FOLDER, or by the variable MPIML_DATA")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is {'a file' if Path(folder).exists() else 'not there'}: name the folder that holds "
                                f"{name}, by --data FOLDER or by the variable MPIML_DATA")
    found = [path for path in (Path(folder, name), *sorted(Path(folder).glob(f"*/{name}"))) if path.is_file()]
    if not found:
        raise FileNotFoundError(f"neither {folder} nor a folder in it holds {name}: name another one by --data FOLDER, or by "
                                f"the variable MPIML_DATA")
    return found[0]
