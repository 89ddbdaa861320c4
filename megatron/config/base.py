"""What all sections of the configuration share: frozen, strictly typed, closed against unknown names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from megatron.config.frozen import freeze

# Dictionaries and free lists keep NeoX's free form, but nobody may write into them after loading.
Options = Annotated[dict[str, Any], AfterValidator(freeze)]
Names = tuple[str, ...]


class Section(BaseModel):
    """A frozen group of keys. Field names are NeoX's flat keys, so a name is unique over all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)
