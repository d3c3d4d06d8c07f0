"""A tokenizer file, and the note beside it about the text that was held out from its training.

my/tokenizer.json            the format of the `tokenizers` library, which allows no additional fields
my/tokenizer.training.json   the note; a tokenizer from elsewhere has none
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter
from tokenizers import Tokenizer

from data_prep.encoding import can_be_cut
from mythos.data.format import BOS
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import read_bytes, write_atomically
from mythos.readers import LARGE_FILE_BYTES, Count, read_json

_REMEDY = "train one by `mythos data tokenizer`"
DEFAULT_VALIDATION_PERCENT = 1.0


@dataclass(frozen=True)
class TrainingNote:
    """How a tokenizer was trained."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    tokenizer_sha256: str
    validation_percent: Annotated[float, Field(ge=0, le=100)]
    text_bytes: Count
    held_out_bytes: Count
    held_out_tokens: Count

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of held-out text per token, without BOS; None if no text was held out."""
        return self.held_out_bytes / self.held_out_tokens if self.held_out_tokens else None

    def save(self, tokenizer: Path) -> None:
        """Write the note beside the tokenizer file."""
        write_atomically(_note_path(tokenizer), json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer and the bytes of its file."""

    encoder: Tokenizer
    content: bytes
    sha256: str
    bos: int
    """The id of the token that begins each document."""
    cut: bool
    """Whether long documents are encoded in pieces: see ``data_prep.encoding``."""

    @property
    def vocabulary_size(self) -> int:
        """The largest id plus one."""
        return max(self.encoder.get_vocab().values()) + 1

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids that stand for no text, ascending: the BOS, and what the file marks as special."""
        added = self.encoder.get_added_tokens_decoder().items()
        return tuple(sorted({self.bos, *(token_id for token_id, token in added if token.special)}))


def load_tokenizer(path: Path, bos: str = BOS) -> TokenizerFile:
    """Read a tokenizer, set to no truncation and no padding.

    Args:
        bos: the token that begins each document.

    Raises:
        UserError: it is damaged or has no such token.
    """
    with os_errors_as_user_errors(path, _REMEDY):
        content = read_bytes(path, LARGE_FILE_BYTES)
    return _parse(path, content, bos)


@lru_cache(maxsize=1)
def _parse(path: Path, content: bytes, bos: str) -> TokenizerFile:
    try:
        encoder = Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise UserError(f"{path}: not a tokenizer file ({str(error).splitlines()[0]}); {_REMEDY}") from error
    bos_id = encoder.token_to_id(bos)
    if bos_id is None:
        raise UserError(f"{path}: has no token {bos}; name the one that begins its texts: --bos TOKEN")
    # "<|bos|>" inside a document is encoded as plain text, so that BOS only marks the beginning of a document.
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return TokenizerFile(encoder, content, hashlib.sha256(content).hexdigest(), bos_id, can_be_cut(encoder))


def agreed_validation_percent(tokenizer: Path, sha256: str, asked: float | None) -> float:
    """The percentage that was asked for, or else the one that was held out from the training of the tokenizer.

    Raises UserError if more is asked for: the tokenizer would then have been trained on validation text. Less is fine,
    because a document that is in validation at some percentage is in validation at any higher one.
    """
    path = _note_path(tokenizer)
    note = None
    if path.exists():
        note = read_json(path, TypeAdapter(TrainingNote), "remove it, or train the tokenizer again")
    if note is None or note.tokenizer_sha256 != sha256:
        return DEFAULT_VALIDATION_PERCENT if asked is None else asked
    if asked is not None and asked > note.validation_percent:
        raise UserError(
            f"--validation-percent {asked}: {tokenizer} was trained with {note.validation_percent} held out, so it has "
            f"seen part of this validation text; give at most {note.validation_percent}, or train it again "
            f"with --validation-percent {asked}"
        )
    return note.validation_percent if asked is None else asked


def _note_path(tokenizer: Path) -> Path:
    return tokenizer.with_name(f"{tokenizer.stem}.training.json")
