"""The kinds of models. A further model is one file or folder of its own and one line here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stgt.errors import CheckpointError

if TYPE_CHECKING:
    from stgt.interface.inputs import VideoTextConfig
    from stgt.interface.model import VideoTextModel

KIND = "kind"
"""Key of a config that tells the kind of its model."""
FIRST_KIND = "stgt"
"""Kind of a config without that key."""


@dataclass(frozen=True)
class Kind:
    """A kind of model. Its classes are imported when they are needed."""

    name: str
    config: str
    """Config class, as MODULE:NAME. Loads no torch."""
    model: str
    """Model class, as MODULE:NAME; takes a config and a tokenizer."""
    hub: str | None = None
    """Module that reads folders in the form of the Hugging Face Hub; None if there is none. It has
    `MODEL_TYPES`, `read_config(FOLDER)`, `read_tokenizer(FOLDER)` and `load(FOLDER)`."""
    writes_captions: bool = False
    """Whether the model has a method `caption` that writes captions; see `stgt.model.STGT`."""


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("stgt", "stgt.config:ModelConfig", "stgt.model:STGT", writes_captions=True),
        Kind(
            "dual_encoder",
            "stgt.dual_encoder.config:DualEncoderConfig",
            "stgt.dual_encoder.model:DualEncoder",
            hub="stgt.dual_encoder.hub",
        ),
        Kind("alpro", "stgt.alpro.config:AlproConfig", "stgt.alpro.model:Alpro"),
    )
}


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def kind_named(name: str, where: str) -> Kind:
    """Return a kind of model.

    Raises:
        CheckpointError: There is no such kind.
    """
    if name not in KINDS:
        raise CheckpointError(
            f"{where} holds a model of the kind {name!r}; this version knows {', '.join(KINDS)}"
        )
    return KINDS[name]


def config_from_dict(values: dict[str, Any], where: str = "the config") -> VideoTextConfig:
    """Build a model's config from the output of its `to_dict`; without a kind it is STGT's.

    Raises:
        CheckpointError: The kind is unknown.
        TypeError: A name is unknown.
        SettingError: A value is out of range.
    """
    kind = kind_named(values.get(KIND, FIRST_KIND), where)
    return _imported(kind.config).from_dict(values)


def build(config: VideoTextConfig, tokenizer: Any = None) -> VideoTextModel:
    """Build a model with random weights."""
    return _imported(KINDS[config.kind].model)(config, tokenizer)


def hub_module(model_type: str | None) -> Any:
    """Return the module that reads hub folders whose config.json has a `model_type`, or None."""
    for kind in KINDS.values():
        if kind.hub is not None:
            module = importlib.import_module(kind.hub)
            if model_type in module.MODEL_TYPES:
                return module
    return None


def known_hub_types() -> list[str]:
    """Return every `model_type` of hub folders that can be read."""
    modules = [importlib.import_module(kind.hub) for kind in KINDS.values() if kind.hub]
    return sorted(name for module in modules for name in module.MODEL_TYPES)
