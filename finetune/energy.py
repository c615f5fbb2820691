"""What the GPUs of this machine have used, by their own counters (NVML): `reading()`, `used(events)`."""

from __future__ import annotations

import socket
from typing import Any

JOULES_PER_KWH = 3_600_000


def reading() -> dict[str, Any]:
    """Facts for an event: the energy counters of this machine's NVIDIA GPUs in joules, by their ids, or why none.

    Counters run since the driver was loaded and count all programs on a GPU.
    """
    counters = _counters()
    return {"host": socket.gethostname(), "joules": counters} if counters else {"no_energy": _why_unknown()}


def used(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Energy between the beginning and the end of every stage, in kWh; null with the reason where it is not known."""
    stages: dict[str, float] = {}
    open_at: dict[str, dict[str, Any]] = {}
    missed = False
    for event in events:
        if "stage" not in event:
            continue
        name = event["stage"]
        if event["what"] in ("started", "continued"):
            missed |= name in open_at  # it ended without a word: killed
            open_at[name] = event
        elif name in open_at:
            begun = open_at.pop(name)
            if "joules" not in begun or "joules" not in event or begun["host"] != event["host"]:
                missed = True
                continue
            first, last = begun["joules"], event["joules"]
            joules = sum(last[gpu] - first[gpu] for gpu in last if gpu in first and last[gpu] >= first[gpu])
            stages[name] = stages.get(name, 0.0) + joules / JOULES_PER_KWH
    if not stages:
        why = [event["no_energy"] for event in events if "no_energy" in event]
        reason = why[-1] if why else "no stage was noted"
        return {"kwh": None, "stages": {}, "whole": False, "how": f"not measured: {reason}"}
    how = "NVML counters of the GPUs of the machine that carried the stages out, all programs on them counted"
    how += "; some stretches were not counted (killed, or another machine)" if missed or open_at else ""
    return {"kwh": sum(stages.values()), "stages": stages, "whole": not missed and not open_at, "how": how}


def _why_unknown() -> str:
    try:
        import pynvml  # noqa: F401
    except ImportError:
        return "the package nvidia-ml-py (extra [energy]) is not installed"
    return "there was no NVIDIA GPU that counts its energy"


def _counters() -> dict[str, float]:
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    found = {}
    try:
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            try:
                uuid = pynvml.nvmlDeviceGetUUID(handle)
                joules = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # the counter is in mJ
            except pynvml.NVMLError:
                continue  # older than Volta
            found[uuid if isinstance(uuid, str) else uuid.decode()] = joules
    finally:
        pynvml.nvmlShutdown()
    return found
