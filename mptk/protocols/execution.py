"""execution: the memory and the device that a run uses."""

from __future__ import annotations

import torch

from mptk.config import Settings
from mptk.errors import InputError, MachineError
from mptk.io import Resident, choose_memory_bound
from mptk.ort.sessions import CPU, HOST, list_providers
from mptk.staged.staged import Executor

RESIDENT_SHARE, STAGE_SHARE, BORDERS_SHARE = 0.5, 0.25, 0.125
"""Shares of the memory bound: weights that stay after their stage, the weights of a stage, and values between stages.
The rest is for computing a stage."""


def build_executor(settings: Settings) -> tuple[Resident, Executor]:
    """The store of weights and the executor of programs, within the settings' memory.

    Raises:
        MptkError: there is no such device.
    """
    bound, device = choose_memory_bound(settings.memory), find_device(settings.device)
    # A stage's weights go to the device, so its memory bounds them, too.
    stage = STAGE_SHARE * bound
    if (room := measure_device_memory(device)) is not None:
        stage = min(stage, STAGE_SHARE * room)
    return Resident(int(RESIDENT_SHARE * bound)), Executor(stage=stage, borders=BORDERS_SHARE * bound, device=device)


def measure_device_memory(device: torch.device) -> float | None:
    """Free bytes of the device's own memory; None if it has none or the number is unknown."""
    if device.type == "cpu":
        return None
    asked = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if asked is None else float(asked(device)[0])


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the accelerator or, if there is none, the CPU.

    Raises:
        MptkError: this machine has no such device.
    """
    # torch.device() takes the name of any device, also of one that is not here, so each part is checked.
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return there or CPU
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"no device {name!r}; choose auto, cpu, cuda, cuda:N, mps or xpu",
            name="device",
            nearest=("auto", "cpu", "cuda", "mps", "xpu"),
        ) from error
    if device.type != "cpu" and (there is None or device.type != there.type):
        has = "only a CPU" if there is None else f"a CPU and {there.type}"
        raise MachineError(f"this machine has no device {name}, {has}; choose another --device", name="device")
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        raise MachineError(
            f"this machine has no device {name}, only {torch.accelerator.device_count()} of that kind; choose another "
            "--device",
            name="device",
        )
    return device


def find_session_device(name: str) -> torch.device:
    """The device of that name for ONNX Runtime; ``auto`` is the CPU if there is no provider for the accelerator.

    Raises:
        MptkError: this machine has no such device, or this ONNX Runtime no execution provider for it.
    """
    device = find_device(name)
    # The CPU's provider is the last of the list, so it is first only if there is none for this device.
    if device.type == "cpu" or list_providers(device)[0][0] != HOST:
        return device
    if name != "auto":
        raise MachineError(
            f"this ONNX Runtime has no execution provider for {name}; install one that has it, as onnxruntime-gpu for "
            "cuda, or choose --device cpu",
            name="device",
        )
    return CPU
