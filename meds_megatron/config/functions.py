"""Functions of the user's own that a config names."""

from operator import attrgetter

from meds_megatron.config.changes import settings_of
from meds_megatron.config.load import schema_choices
from meds_megatron.config.schema import Config
from meds_megatron.user_functions import absolute, is_function, load_function, source_digest


def named_functions(config: Config) -> dict[str, str]:
    """By dotted key, the functions that the config names."""
    settings = settings_of(config)
    return {key: settings[key] for key in schema_choices() if is_function(settings[key])}


def function_files(config: Config) -> list[str]:
    """Files, not modules, that the config names functions of."""
    sources = [value.rpartition(":")[0] for value in named_functions(config).values()]
    return [source for source in sources if source.endswith(".py")]


def resolve_functions(config: Config) -> None:
    """Names functions by the absolute paths of their files, and imports each. Raises UserError for one that is not
    there."""
    for key, value in named_functions(config).items():
        section, name = key.rsplit(".", 1)
        setattr(attrgetter(section)(config), name, absolute(value))
        load_function(key, absolute(value))


def function_digests(config: Config) -> dict[str, str]:
    """Digest of the file of each function that the config names, by dotted key."""
    return {key: source_digest(key, value) for key, value in named_functions(config).items()}
