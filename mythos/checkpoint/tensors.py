"""Writes named tensors to a safetensors file, and waits until it is on the disk.

The format (https://huggingface.co/docs/safetensors) is a length, a JSON header and the bytes of the tensors. Unlike a
pickle, nothing in it is executed when it is read. The library writes from the tensors' own memory and releases the
interpreter's lock meanwhile, so that training continues (version 0.8; earlier ones hold it).
"""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mythos.checkpoint.manifest import FileRecord

METADATA = {"format": "pt"}
READ_WRITE = 0o666


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write contiguous CPU tensors that share no memory as one safetensors file.

    Raises:
        OSError: the disk is full or gone; its ``filename`` is ``path``.
    """
    try:
        save_file(dict(tensors), path, METADATA)
        path.chmod(path.parent.stat().st_mode & READ_WRITE)  # the library makes it readable by the owner only
        record = FileRecord.of(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:  # has the reason only as text
        raise OSError(errno.EIO, str(error), str(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return record
