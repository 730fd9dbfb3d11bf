"""Core configurations: one frozen dataclass, named presets, user TOML files."""

from __future__ import annotations

import dataclasses
import operator
import tomllib
from pathlib import Path

__all__ = ["METHODS", "CoreConfig", "ConfigError", "PRESETS", "load"]

METHODS = ("niti", "wage", "dfp")
"""Training methods a core can be built for. niti stands for its variant niti-2020, too."""


class ConfigError(ValueError):
    """A configuration that cannot be built: names the rule, the value and the nearest legal value."""


def _nearest_power_of_two(value: int, low: int, high: int) -> int:
    return min((1 << k for k in range(low.bit_length() - 1, high.bit_length())), key=lambda p: abs(p - value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """Everything that shapes the generated hardware.

    Parameters
    ----------
    name : identifies the configuration in file names and reports.
    rows, columns : processing elements of the systolic array; powers of two, 4 to 32, may differ. A *vector*
        is ``max(rows, columns)`` channels.
    lanes : elements that the vector engine works on per cycle: a vector (default), or half of one, at least 4. A
        *line*, the unit in which the core talks to memory, has 4 bytes for each lane: it is 4 or 2 vectors of int8, all
        or half of a vector of int32. Half the lanes make a smaller core whose passes over memory take up to twice as
        long.
    beat_bytes : AXI data width in bytes, a power of two from 8 up to the line (default: the line).
    buffer_lines : lines in each of the two banks of each operand buffer.
    accumulator_entries : int32 vectors held below the array while they are summed over taps and channel tiles.
    result_entries : int32 vectors of finished results waiting for memory.
    weight_lines : lines of the weight ring, which hides the memory's latency from weight tiles.
    methods : training methods, one or more of ``METHODS`` (default: all). Units, rounding rules and widths that none of
        them needs are left out; a descriptor that asks for one is illegal.
    """

    name: str
    rows: int
    columns: int
    lanes: int = 0
    beat_bytes: int = 0
    buffer_lines: int = 512
    accumulator_entries: int = 512
    result_entries: int = 512
    weight_lines: int = 64
    methods: tuple[str, ...] = METHODS

    def __post_init__(self):
        known = isinstance(self.methods, (list, tuple)) and [name for name in METHODS if name in self.methods]
        if not known or len(known) != len(self.methods):
            raise ConfigError(f"core {self.name!r}: methods must be a list of one or more of {', '.join(METHODS)}, "
                              f"each once, not {self.methods!r}")
        object.__setattr__(self, "methods", tuple(known))
        for field in dataclasses.fields(self):
            if field.name not in ("name", "methods"):
                try:
                    value = operator.index(getattr(self, field.name))
                except TypeError:
                    raise ConfigError(f"core {self.name!r}: {field.name} must be an integer, "
                                      f"not {getattr(self, field.name)!r}") from None
                object.__setattr__(self, field.name, value)
        self._power_of_two("rows", 4, 32)
        self._power_of_two("columns", 4, 32)
        if self.lanes == 0:
            object.__setattr__(self, "lanes", self.vector)
        self._power_of_two("lanes", max(4, self.vector // 2), self.vector)
        if self.beat_bytes == 0:
            object.__setattr__(self, "beat_bytes", self.line_bytes)
        self._power_of_two("beat_bytes", 8, self.line_bytes)
        self._power_of_two("buffer_lines", 64, 4096)
        self._power_of_two("accumulator_entries", 4 * self.rows, 4096)
        self._power_of_two("result_entries", 2 * self.rows, 4096)
        self._power_of_two("weight_lines", self.vector * self.parts, 1024)

    def _power_of_two(self, field: str, low: int, high: int):
        value = getattr(self, field)
        if not (low <= value <= high and value & (value - 1) == 0):
            raise ConfigError(f"core {self.name!r}: {field} must be a power of two from {low} to {high}, "
                              f"not {value}; the nearest legal value is {_nearest_power_of_two(value, low, high)}")

    @property
    def vector(self) -> int:
        """Channels of one stored vector: every tensor's channels are padded to a multiple of this."""
        return max(self.rows, self.columns)

    @property
    def line_bytes(self) -> int:
        """Bytes of one line: an int32 for each lane."""
        return 4 * self.lanes

    @property
    def parts(self) -> int:
        """Parts, of one element per lane, in which the vector engine works on a vector: 1 or 2."""
        return self.vector // self.lanes

    @property
    def vectors_per_line(self) -> int:
        """int8 vectors in a line: 4 or 2."""
        return self.line_bytes // self.vector

    @property
    def result_lines(self) -> int:
        """Lines of one result of the array, an int32 for each column: 1 (or a part of one) or 2."""
        return max(1, self.columns // self.lanes)

    @property
    def line_bits(self) -> int:
        return 8 * self.line_bytes

    def replace(self, **changes) -> CoreConfig:
        return dataclasses.replace(self, **changes)


PRESETS = {config.name: config for config in (
    CoreConfig(name="tiny", rows=4, columns=4, buffer_lines=256, accumulator_entries=256, result_entries=256),
    *(CoreConfig(name=name, rows=8, columns=8, lanes=4, buffer_lines=1024, weight_lines=128, methods=methods)
      for name, methods in (("small", METHODS), *((f"small-{method}", (method,)) for method in METHODS))),
    CoreConfig(name="base", rows=16, columns=16),
    CoreConfig(name="large", rows=32, columns=32, beat_bytes=64),
    CoreConfig(name="wide", rows=4, columns=8),
)}


def load(name_or_path: str) -> CoreConfig:
    """A preset by name, or a TOML file whose keys are the fields of :class:`CoreConfig`.

    Raises :class:`ConfigError` with one line that says what to change.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    if path.suffix != ".toml":
        raise ConfigError(f"unknown core {name_or_path!r}: choose one of {', '.join(PRESETS)}, "
                          "or give a .toml file")
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"core file {name_or_path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"core file {name_or_path} is not valid TOML: {error}") from None
    values.setdefault("name", path.stem)
    known = {field.name for field in dataclasses.fields(CoreConfig)}
    for key in values:
        if key not in known:
            raise ConfigError(f"core file {name_or_path}: unknown key {key!r}; known keys: {', '.join(sorted(known))}")
    for key in ("rows", "columns"):
        if key not in values:
            raise ConfigError(f"core file {name_or_path}: missing key {key!r}")
    return CoreConfig(**values)
