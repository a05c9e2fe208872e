"""What all sections of a job file have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from autoglm_resume.job.fields import expected


class Section(BaseModel):
    """A mapping of the job file. A key without a value is as if it were not there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_means_default(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            raise expected("a mapping", data)
        known = cls.keys()
        return {k: v for k, v in data.items() if v is not None or k not in known}

    @classmethod
    def keys(cls) -> dict[str, type[Section] | None]:
        """Every key as the file has it, and the section that stands there, if one does."""
        found: dict[str, type[Section] | None] = {}
        for name, field in cls.model_fields.items():
            kinds = (field.annotation, *get_args(field.annotation))
            sections = (k for k in kinds if isinstance(k, type) and issubclass(k, Section))
            found[field.alias or name] = next(sections, None)
        return found


@dataclass(frozen=True)
class OrShort:
    """Marks a section that may be written as one value too, of which `schema` is the JSON Schema.

    A validator before the section's own turns that value into its mapping.
    """

    schema: JsonSchemaValue

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [self.schema, handler(core_schema)]}
