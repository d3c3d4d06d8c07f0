"""The part of the configuration tree that describes the initial weights, where recipes differ."""

from typing import Literal

from mythos.config.option import Needs, option, section

VALUE_EMBEDDINGS = Needs("model.attention.value_embeddings")


@section
class Init:
    """Initial weights. With s = sqrt(2 / (5 width)) and unless an option here says otherwise: matrices are orthogonal
    with entries of root mean square s, tables normal with deviation s, norms 1, output projections 0 (arXiv
    2604.12946)."""

    token_table: Literal["normal", "orthogonal"] = option(
        "token table: normal, or orthogonal columns, with entries of root mean square s either way; the code of arXiv "
        "2604.12946: orthogonal",
        "normal",
    )
    head_norm: Literal["ones", "small"] = option(
        "scale of the norm before the tied head: 1, or ln(vocabulary)/(2 s width), with which a fresh model predicts "
        "all tokens nearly alike; arXiv 2604.12946: ones, with which a standard one first predicts its own input token",
        "ones",
    )
    value_tables: Literal["normal", "standard_normal"] = option(
        "value tables: normal with deviation s, or 1; the code of arXiv 2604.12946: standard_normal",
        "normal",
        needs=VALUE_EMBEDDINGS,
    )
    value_gates: Literal["orthogonal", "uniform"] = option(
        "gates of the value tables: orthogonal, or uniform within 1/sqrt(32), torch's own start of such a layer; the "
        "code of arXiv 2604.12946: uniform",
        "orthogonal",
        needs=VALUE_EMBEDDINGS,
    )
    key_value: Literal["together", "each"] = option(
        "key and value matrices, stored in one parameter: orthogonal together, or each by itself; the code of arXiv "
        "2604.12946: each",
        "together",
        needs=Needs("model.attention.kind", ("gqa",)),
    )
