"""Writes named tensors to a safetensors file, and waits until it is on the disk.

The format (https://huggingface.co/docs/safetensors) is a length, a JSON header and the bytes of the tensors. Unlike a
pickle, nothing in it is executed when it is read. The library writes from the tensors' own memory and releases the
interpreter's lock meanwhile, so that training continues (version 0.8; earlier ones hold it).
"""

import errno
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mythos.checkpoint.manifest import FileRecord
from mythos.files import flush_file

METADATA = {"format": "pt"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write contiguous CPU tensors that share no memory as one safetensors file.

    Raises:
        OSError: the disk is full or gone; its ``filename`` is ``path``.
    """
    try:
        path.touch()
        mode = path.stat().st_mode  # which the library would replace by that of a file for its owner only
        save_file(dict(tensors), path, METADATA)
        with suppress(OSError):  # a file system without modes: the tensors matter more
            path.chmod(mode)
        record = FileRecord.of(path)
        flush_file(path)
    except SafetensorError as error:  # has the reason only as text
        raise OSError(errno.EIO, str(error), str(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return record
