"""`RunConfig`: everything a run is told, in typed frozen sections, together with where each value came from.

The sections are found by field name, so a flat NeoX key and its section agree by construction; `key_fields` is that
index and the only place where the flat namespace meets the sections.
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
    """One run. Made by `load.load_config`, never changed afterwards."""

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
    """Where a flat key lives: section, annotation (with its limits), default."""

    section: str
    info: FieldInfo
    default: Any


@functools.cache
def sections() -> dict[str, type[Section]]:
    """Section name -> class, in the order of `RunConfig`."""
    found: dict[str, type[Section]] = {}
    for name, info in RunConfig.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            found[name] = info.annotation
    return found


@functools.cache
def key_fields() -> dict[str, KeyField]:
    """Flat key -> its field, over all sections. A key in two sections is a defect of ours and fails at import."""
    index: dict[str, KeyField] = {}
    for section, cls in sections().items():
        for key, info in cls.model_fields.items():
            assert key not in index, f"{key} is in two sections"
            index[key] = KeyField(section, info, info.get_default(call_default_factory=True))
    return index
