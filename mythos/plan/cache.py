"""Memory of a key-value cache at inference: one entry for each layer and, in the core, for each loop step."""

from mythos.config.model_schema import Dense, GroupedQuery, Latent, Looped


def cached_channels(attention: GroupedQuery | Latent) -> int:
    """Numbers of a token and layer: keys and values; or the latent and the shared rotated key."""
    match attention:
        case GroupedQuery():
            return 2 * attention.kv_heads * attention.head_size
        case Latent():
            return attention.key_value_latent_size + attention.rotary_head_size


def cache_bytes(model: Looped | Dense, depth: int, tokens: int, element_bytes: int) -> int:
    """Bytes of the cache of so many tokens at this depth (which a dense model has not)."""
    if isinstance(model, Dense):
        layers = model.layers
    else:
        layers = model.prelude_layers + model.core_layers * depth + model.coda_layers
    return layers * tokens * cached_channels(model.attention) * element_bytes
