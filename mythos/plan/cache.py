"""Memory of a key-value cache at inference: one entry for each layer and, in the core, for each loop step."""

from mythos.config.model_schema import CACHE_BLOCK_TOKENS, Dense, GroupedQuery, Latent, Looped


def cached_channels(attention: GroupedQuery | Latent) -> int:
    """Numbers of a token and layer: keys and values; or the latent and the shared rotated key."""
    match attention:
        case GroupedQuery():
            return 2 * attention.kv_heads * attention.head_size
        case Latent():
            return attention.key_value_latent_size + attention.rotary_head_size


def cache_bytes(model: Looped | Dense, depth: int, tokens: int, element_bytes: int) -> int:
    """Bytes of the cache of a sequence of so many tokens, in complete blocks, at this depth (of a looped model)."""
    if isinstance(model, Dense):
        layers = model.layers
    else:
        layers = model.prelude_layers + model.core_layers * depth + model.coda_layers
    blocks = -(-tokens // CACHE_BLOCK_TOKENS)
    return layers * blocks * CACHE_BLOCK_TOKENS * cached_channels(model.attention) * element_bytes
