"""Claims about room: devices that hold one copy, supercomputers, the largest clusters."""

from __future__ import annotations

from headrace.economics.claims.facts import DEVICES, larger_fact, memory_bytes, memory_name, model_fact
from headrace.economics.claims.ledger import Default, Ledger, Outcome, checks, whole
from headrace.units import format_bytes, format_number

_SMALL = "V100-16"
_HUNDREDS = 100
_TRAINED_ON = ("V100-32", _SMALL)


ASSUMPTIONS: dict[str, Default] = {
    "gpt3_weights_bytes": model_fact("gpt-3", "weights_bytes"),
    "larger_weights_bytes": larger_fact("weights_bytes"),
    **{memory_name(device): memory_bytes(name) for device, name in DEVICES.items()},
}


@checks("hundreds-to-fit")
def _hundreds(given: Ledger) -> Outcome:
    weights = given("gpt3_weights_bytes")
    needed = {device: whole(weights / given(memory_name(device))) for device in (*DEVICES, _SMALL)}
    state = given("training_bytes_per_parameter") * given("gpt3_parameters")
    training = {device: whole(state / given(memory_name(device))) for device in _TRAINED_ON}
    most = max(needed.values())
    verdict = "holds" if most >= _HUNDREDS else f"false: {min(needed.values())} to {most} devices hold it"
    if most < _HUNDREDS <= max(training.values()):
        verdict += "; hundreds are what training needs"
    return Outcome(
        verdict,
        f"{format_bytes(weights)} of weights / memory: "
        + ", ".join(f"{number} {device}" for device, number in needed.items())
        + f". Training: {given('training_bytes_per_parameter'):g} B x {format_number(given('gpt3_parameters'))} = "
        + f"{format_bytes(state)}: "
        + ", ".join(f"{number} {device}" for device, number in training.items()),
        {
            **{f"devices {device}": float(number) for device, number in needed.items()},
            **{f"training devices {device}": float(number) for device, number in training.items()},
        },
    )


@checks("one-copy-1000x")
def _one_copy(given: Ledger) -> Outcome:
    weights = given("larger_weights_bytes")
    then = given("summit_devices") * given(memory_name(_SMALL)) / weights
    now = given("largest_cluster_devices") * given("largest_cluster_device_bytes") / weights
    needed = {device: whole(weights / given(memory_name(device))) for device in ("V100-32", "H100", "GB300")}
    disks = weights / given("dgx2_disk_bytes")
    return Outcome(
        f"{_room(then)} then, {_room(now)} now",
        f"{format_bytes(weights)} = "
        + ", ".join(f"{number:,} {device}" for device, number in needed.items())
        + f", or the disks of {whole(disks)} DGX-2. Device memory of Summit {then:.3g} times that, of the largest "
        f"cluster now {now:.3g} times",
        {
            "copies_in_summit": then,
            "copies_in_largest_cluster": now,
            **{f"devices {device}": float(number) for device, number in needed.items()},
        },
    )


def _room(copies: float) -> str:
    """Whether it is true that not one copy has room."""
    return "holds" if copies < 1 else "borderline" if copies < 2 else "false"


@checks("largest-clusters")
def _clusters(given: Ledger) -> Outcome:
    then, now = given("summit_devices"), given("largest_cluster_devices")

    def tens_of_thousands(devices: float) -> str:
        return "holds" if 1e4 <= devices < 1e5 else "false"

    return Outcome(
        f"{tens_of_thousands(then)} then, {tens_of_thousands(now)} now",
        f"{then:,.0f} devices in the largest of 2021, {now:,.0f} now: {now / then:.3g} times",
        {"devices_2021": then, "devices_now": now},
    )
