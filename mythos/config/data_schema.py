"""The part of the configuration tree that describes the data."""

from mythos.config.option import Needs, option, section


@section
class DataSource:
    """One of several data sets."""

    directory: str = option("prepared data set, as data.directory", change="free", path=True, min_length=1)
    weight: float = option("its share of the samples, relative to the others", change="ask", gt=0)


@section
class Data:
    """Prepared data (see `mythos data prepare`): one data set, or several mixed by weight."""

    directory: str | None = option(
        "data set: a path, or the address of an object store (s3://, gs://, oci://, azure://, ...)",
        None,
        change="free",
        path=True,
        min_length=1,
    )
    sources: dict[str, DataSource] = option(
        "instead of directory: several data sets by name, each with its directory and weight",
        change="free",
        default_factory=dict,
    )
    sequence_length: int = option("tokens of one sequence, as the data was prepared", gt=1)
    shuffle_shards: int = option("shards of a data set whose rows are shuffled together", 32, change="ask", gt=0)
    cache_directory: str | None = option(
        "directory on each node's own disk for copies of the shards; null: shards are read from the data set itself",
        None,
        change="free",
        path=True,
        min_length=1,
    )
    cache_gib: float = option(
        "largest size of the cache, GiB", 64.0, change="free", gt=0, le=10**9, needs=Needs("data.cache_directory")
    )
