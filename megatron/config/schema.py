"""`RunConfig`: the configuration of a run in typed frozen sections, with the provenance of each value.

A flat key is a field of exactly one section; `key_fields` is the index.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

from megatron.config.command_sections import EvaluationSection, GenerationSection, LaunchSection, LoggingSection
from megatron.config.frozen import Options, Section, freeze, thaw
from megatron.config.model_section import ModelSection
from megatron.config.run_sections import (
    BatchSection,
    CheckpointSection,
    DataSection,
    OptimizerSection,
    ParallelSection,
    PrecisionSection,
    ReliabilitySection,
    ScheduleSection,
    TokenizerSection,
    TrainingSection,
)

LayerOptions = Annotated[dict[str, dict[str, Any]], AfterValidator(freeze)]


class RunConfig(Section):
    """The configuration of one run, see `load.load_config`."""

    name: str = Field(default="run", description="the first config file's name without its ending")
    model: ModelSection = ModelSection()
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    batch: BatchSection = BatchSection()
    precision: PrecisionSection = PrecisionSection()
    training: TrainingSection = TrainingSection()
    data: DataSection = DataSection()
    tokenizer: TokenizerSection = TokenizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    launch: LaunchSection = LaunchSection()
    generation: GenerationSection = GenerationSection()
    evaluation: EvaluationSection = EvaluationSection()
    reliability: ReliabilitySection = ReliabilitySection()
    layers: LayerOptions = Field(default={}, description="mixer name -> its options that were set")
    unused: Options = Field(default={}, description="NeoX keys that were given and have no section (ignored or refused)")
    provenance: Options = Field(default={}, description='key -> "file:line", "--set", "default" or "derived: why"')
    config_texts: Options = Field(default={}, description="base name of each config file -> its text")
    warnings: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Processes of the run; 0 while not known."""
        return self.parallel.world_size

    def get(self, key: str) -> Any:
        """The value of a flat key, layer options and unused keys included; KeyError if there is no such key."""
        fields = key_fields()
        if key in fields:
            return getattr(getattr(self, fields[key].section), key)
        if key in self.unused:
            return self.unused[key]
        for layer, options in self.layers.items():
            if key.startswith(f"{layer}_") and key[len(layer) + 1 :] in options:
                return options[key[len(layer) + 1 :]]
        raise KeyError(key)

    def flat(self) -> dict[str, Any]:
        """All keys that differ from their default, given or derived, under NeoX's flat names, ready for JSON or YAML.

        Reading the result back as a config file gives an equal configuration.
        """
        result: dict[str, Any] = {}
        for key, info in key_fields().items():
            value = thaw(getattr(getattr(self, info.section), key))
            if value != thaw(info.default) and key != "world_size":
                result[key] = value
        for layer, options in self.layers.items():
            result.update({f"{layer}_{field}": thaw(value) for field, value in options.items()})
        result.update(thaw(self.unused))
        return result


@dataclass(frozen=True)
class KeyField:
    """Section, annotation (with its bounds) and default of a flat key."""

    section: str
    info: FieldInfo
    default: Any


@functools.cache
def sections() -> dict[str, type[Section]]:
    """Section name -> class, in the order of `RunConfig`."""
    types = {name: info.annotation for name, info in RunConfig.model_fields.items()}
    return {name: cls for name, cls in types.items() if isinstance(cls, type) and issubclass(cls, Section)}


@functools.cache
def key_fields() -> dict[str, KeyField]:
    """Flat key -> its field, over all sections."""
    index: dict[str, KeyField] = {}
    for section, cls in sections().items():
        for key, info in cls.model_fields.items():
            assert key not in index, f"{key} is in two sections"
            index[key] = KeyField(section, info, info.get_default(call_default_factory=True))
    return index
