"""What the core's engines worked on over time, as a trace for ui.perfetto.dev (Chrome's JSON trace format)."""

import json
from pathlib import Path

ENGINES = ("product engine", "vector engine")


def write_trace(path, events, names, last_cycle):
    """Write `events` (rows of cycle, engine, tag; -1: idle) as slices named `names[tag]`; one cycle is one microsecond.

    The recording holds a limited number of events, so a long run's trace covers its first steps.
    """
    entries = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "core (1 us = 1 cycle)"}}]
    for engine, name in enumerate(ENGINES):
        entries.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": engine, "args": {"name": name}})
        own = [(int(cycle), int(tag)) for cycle, number, tag in events if number == engine]
        end = min(last_cycle, int(events[-1][0])) if len(events) else last_cycle
        for (cycle, tag), (following, _) in zip(own, [*own[1:], (end, -1)], strict=True):
            if tag >= 0 and following > cycle:
                slice_ = {"ph": "X", "pid": 1, "tid": engine, "ts": cycle, "dur": following - cycle}
                entries.append({**slice_, "name": names.get(tag, f"tag {tag}")})
    Path(path).write_text(json.dumps({"traceEvents": entries, "displayTimeUnit": "ns"}))
