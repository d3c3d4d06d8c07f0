"""What transformers needs beside the weights: configuration, tokenizer, and the code of the model.

The code is this project's own: the files that ``modeling_mythos.py`` imports, in one directory, with relative imports.
Only the declaration of options is another file, since the configuration is not checked there.
"""

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors

import mythos
from mythos.config.derive import whole_mean_depth
from mythos.config.load import to_dict
from mythos.config.model_schema import Looped
from mythos.config.schema import Config
from mythos.data.format import TOKENIZER_FILE
from mythos.data.open import read_tokenizer
from mythos.errors import UserError

CONFIGURATION, MODELING = "mythos.export.configuration_mythos", "mythos.export.modeling_mythos"
STAND_INS = {"mythos.config.option": "mythos.export.option"}
TYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_IMPORT = re.compile(r"^from (mythos[\w.]*) import", re.MULTILINE)


def write_description(directory: Path, config: Config, dtype: torch.dtype, bos: str, eos: str) -> None:
    """Write all files but the weights into a directory that holds the run's tokenizer.

    Args:
        bos: begins each document.
        eos: ends a text; a batch is padded with it.

    Raises:
        UserError: the tokenizer has no such token.
    """
    tokenizer = read_tokenizer(directory / TOKENIZER_FILE)
    ids = {"bos": _id(tokenizer, bos, "--bos"), "eos": _id(tokenizer, eos, "--eos")}
    ids["pad"] = ids["eos"]
    of_tokens = {f"{name}_token_id": number for name, number in ids.items()}
    files: dict[str, dict[str, Any]] = {
        "config.json": _configuration(config, dtype) | of_tokens,
        "generation_config.json": of_tokens,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": tokenizer.id_to_token(number) for name, number in ids.items()},
            "model_max_length": config.data.sequence_length,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # the name of a special token in a text is text, as in training
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # One BOS before each text, whatever the tokenizer did elsewhere.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, ids["bos"])]
    )
    (directory / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    for name, text in code().items():
        (directory / name).write_text(text, encoding="utf-8")


def code() -> dict[str, str]:
    """The texts of the Python files by their names."""
    files: dict[str, str] = {}
    waiting = [MODELING]
    while waiting:
        module = waiting.pop()
        if _file(module) in files:
            continue
        text = _source(module)
        files[_file(module)] = _IMPORT.sub(lambda found: f"from .{_file(found[1])[:-3]} import", text)
        waiting += [
            node.module
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mythos")
        ]
    others = sorted(files.keys() - {_file(MODELING)})
    files[_file(MODELING)] += "\n# transformers copies those files of a local model that this one imports itself.\n"
    files[_file(MODELING)] += "".join(f"from .{name[:-3]} import __name__ as _\n" for name in others)
    heading = f"# Part of mythos {mythos.__version__}, Apache-2.0\n"
    return {name: heading + text for name, text in files.items()}


def _configuration(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    tree, model = to_dict(config), config.model
    layers = model.prelude_layers + model.core_layers + model.coda_layers if isinstance(model, Looped) else model.layers
    return {
        "architectures": ["MythosForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION.rpartition('.')[2]}.MythosConfig",
            "AutoModelForCausalLM": f"{MODELING.rpartition('.')[2]}.MythosForCausalLM",
        },
        "model_type": "mythos",
        "torch_dtype": TYPE_NAMES[dtype],
        "tie_word_embeddings": True,
        "vocab_size": model.vocabulary_size,
        "hidden_size": model.width,
        "num_hidden_layers": layers,
        "num_attention_heads": model.attention.heads,
        "max_position_embeddings": config.data.sequence_length,
        "depth": whole_mean_depth(config),
        "model": tree["model"],
        "loop": tree.get("loop"),
        "init": tree["init"],
    }


def _id(tokenizer: Tokenizer, token: str, option: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UserError(f"{option} {token!r}: the run's tokenizer has no such token: name one that it has")
    return int(number)


def _source(module: str) -> str:
    spec = importlib.util.find_spec(STAND_INS.get(module, module))
    assert spec, module
    assert spec.origin, module
    return Path(spec.origin).read_text(encoding="utf-8")


def _file(module: str) -> str:
    """``mythos.model.loop`` is in mythos_model_loop.py; the two files that transformers looks for have short names."""
    short = module.rpartition(".")[2] if module in (CONFIGURATION, MODELING) else module.replace(".", "_")
    return f"{short}.py"
