"""`load_in_transformers.py RESULTS DIRECTORY ...`: loads exports where this project cannot be imported."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["Caf\u00e9", "A longer one: <|bos|> is text. \U0001f600"]
GENERATED = 64


def results(directory: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", trust_remote_code=True)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    deeper = {} if model.config.depth is None else {"depth": 5}
    found: dict[str, Any] = {
        "ids": tokenizer(TEXTS)["input_ids"],
        "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokenizer(TEXTS)["input_ids"]],
        "special": (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "training": model.training,
    }
    with torch.no_grad():
        found["logits"] = [model(torch.tensor([ids])).logits[0] for ids in found["ids"]]
        found["padded"] = model(**batch, **deeper).logits
        right = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
        found["padded_right"] = model(**right, **deeper).logits
    found["loss"] = model.train()(**batch, labels=batch.input_ids, **deeper).loss
    found["loss"].backward()
    found["gradient"] = model.get_input_embeddings().weight.grad
    model.eval()
    length = {"max_new_tokens": GENERATED, "do_sample": False, "eos_token_id": -1}  # no token ends a text
    found["generated"] = model.generate(**batch, **deeper, **length)[:, batch.input_ids.shape[1] :]
    beams = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": -1}
    found["beams"] = [model.generate(**batch, **deeper, **beams, use_cache=cached) for cached in (True, False)]
    half = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.bfloat16)
    found["fp32_in_bf16"] = sorted(name for name, value in half.state_dict().items() if value.dtype == torch.float32)
    with torch.no_grad():
        found["bf16"] = half(**batch, **deeper).logits
    model.save_pretrained(directory.with_name(f"{directory.name}_saved"))
    again = AutoModelForCausalLM.from_pretrained(directory.with_name(f"{directory.name}_saved"), trust_remote_code=True)
    found["saved"] = all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    found["fresh"] = {name: value for name, value in fresh.state_dict().items() if name != "model.head.weight"}
    return found


if __name__ == "__main__":
    for name in ("mythos", "launch", "data_prep"):
        sys.modules[name] = None  # type: ignore[assignment] - importing it fails
    target, *directories = map(Path, sys.argv[1:])
    torch.save({directory.name: results(directory) for directory in directories}, target)
