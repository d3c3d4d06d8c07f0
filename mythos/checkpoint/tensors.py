"""One file of named tensors: written with its hash in one pass, and flushed to disk.

The format is safetensors (https://huggingface.co/docs/safetensors): a length, a JSON header, the bytes of the tensors.
Nothing in it can be executed when it is read, unlike a pickle. It is written here, and not by the library, because the
library's writer holds the interpreter's lock (training would stand still while it saves) and gives no hash.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from mythos.checkpoint.layout import Written
from mythos.files import CHUNK_BYTES

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Written:
    """Write contiguous CPU tensors as one safetensors file and wait until it is on the disk.

    Raises:
        OSError: the disk is full or gone; a part of the file may be left.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    digest = xxhash.xxh3_64()
    try:
        with path.open("wb", buffering=0) as file:
            for view in (memoryview(struct.pack("<Q", len(text)) + text), *map(_bytes, tensors.values())):
                for start in range(0, len(view), CHUNK_BYTES):
                    _write_all(file.fileno(), view[start : start + CHUNK_BYTES])
                    digest.update(view[start : start + CHUNK_BYTES])
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not say where
    return Written(8 + len(text) + position, digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:  # a disk that fills up takes a part and says so at the next attempt
        view = view[os.write(descriptor, view) :]
