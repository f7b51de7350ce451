"""Claims about the world's devices: how many there are, and how many copies for eight billion readers would need."""

from __future__ import annotations

from typing import NamedTuple

from headrace.economics.claims.facts import equivalents, model_fact, predicted_service, stock, stock_power
from headrace.economics.claims.ledger import Default, Ledger, Outcome, checks
from headrace.economics.owning import HOURS_PER_YEAR
from headrace.units import format_number


class _Case(NamedTuple):
    """A model whose throughput per device was measured in offline batches."""

    key: str
    device: str
    predicted: Default


_CASES = (
    _Case(
        key="llama70b",
        device="b200",
        predicted=predicted_service("llama-3.3-70b", "nvfp4", "b200", prompt_tokens=1024, generate_tokens=1024),
    ),
    _Case(
        key="deepseek_r1",
        device="gb300",
        predicted=predicted_service("deepseek-v3", "nvfp4", "72xgb300", prompt_tokens=1024, generate_tokens=1024),
    ),
    _Case(
        key="llama405b",
        device="b200",
        predicted=predicted_service("llama-3.1-405b", "nvfp4", "8xb200", prompt_tokens=1024, generate_tokens=1024),
    ),
)

ASSUMPTIONS: dict[str, Default] = {
    "stock_h100_equivalents": stock,
    "stock_power_w": stock_power,
    "b200_h100_equivalents": equivalents("b200"),
    "gb300_h100_equivalents": equivalents("gb300"),
    "llama405b_parameters": model_fact("llama-3.1-405b", "parameters"),
    **{f"{case.key}_predicted_tokens_per_s": case.predicted for case in _CASES},
}


def _verdict(times: float) -> str:
    if times <= 1:
        return f"false: {times:.2g} of what is installed would suffice"
    return f"holds: {format_number(float(f'{times:.2g}'))} times what is installed"


def _needed(given: Ledger, rate: float, device: str) -> tuple[float, float, str]:
    """Devices, times the stock, and the arithmetic."""
    readers, each = given("readers"), given("reader_tokens_per_s")
    stocked, worth = given("stock_h100_equivalents"), given(f"{device}_h100_equivalents")
    devices, held = readers * each / rate, stocked / worth
    text = (
        f"{format_number(readers)} x {format_number(each)} tokens/s / {format_number(rate)} per device = "
        f"{format_number(devices)} {device.upper()}; the stock of {format_number(stocked)} H100 equivalents / "
        f"{format_number(worth)} is {format_number(held)} of them: {format_number(devices / held)} times"
    )
    return devices, devices / held, text


for _case in _CASES:

    @checks(f"copies-{_case.key.replace('_', '-')}")
    def _copies(given: Ledger, case: _Case = _case) -> Outcome:
        devices, times, text = _needed(given, given(f"{case.key}_tokens_per_s"), case.device)
        factor, predicted = given("interactive_factor"), given(f"{case.key}_predicted_tokens_per_s")
        return Outcome(
            _verdict(times),
            f"{text}; answering at a promised speed, about {times * factor:.3g} times. Predicted instead of measured: "
            f"{format_number(predicted)} tokens/s per device",
            {
                "devices": devices,
                "times_stock": times,
                "times_stock_interactive": times * factor,
                "predicted_tokens_per_s_per_device": predicted,
            },
        )


@checks("copies-1000x")
def _copies_larger(given: Ledger) -> Outcome:
    parameters = given("growth") * given("gpt3_parameters")
    rate = given("llama405b_tokens_per_s") * given("llama405b_parameters") / parameters
    devices, times, text = _needed(given, rate, "b200")
    return Outcome(
        _verdict(times),
        f"{format_number(parameters)} dense parameters, in proportion to Llama-3.1-405B: {format_number(rate)} "
        f"tokens/s per B200. {text}",
        {"tokens_per_s_per_device": rate, "devices": devices, "times_stock": times},
    )


@checks("world-stock")
def _stock(given: Ledger) -> Outcome:
    total, watts = given("stock_h100_equivalents"), given("stock_power_w")
    worth = given("gb300_h100_equivalents")
    later = [given(f"gb300_equivalents_{year}") * worth for year in (2026, 2027)]
    twh = watts * HOURS_PER_YEAR / 1e12
    all_twh = given("datacentres_2024_twh")
    return Outcome(
        f"{total / 1e6:.3g} million H100 equivalents, {watts / 1e9:.3g} GW of devices",
        f"sum over makers; {watts / total:.3g} W each; run all year {twh:.3g} TWh, {twh / all_twh:.0%} of the "
        f"{all_twh:g} TWh of all data centres in 2024. Through 2026 {format_number(later[0])}, through 2027 "
        f"{format_number(later[1])} are expected",
        {"h100_equivalents": total, "power_w": watts, "twh_per_year": twh, "h100_equivalents_2027": later[1]},
    )


@checks("agent-sessions")
def _sessions(given: Ledger) -> Outcome:
    readers, fewest, most = given("readers"), given("sessions_low"), given("sessions_high")
    low, high = readers / most, readers / fewest
    return Outcome(
        f"holds: {format_number(low)} to {format_number(high)} times too few"
        if low > 1
        else "false: there is room for all",
        f"{format_number(readers)} readers / {format_number(fewest)} to {format_number(most)} sessions at once",
        {"times_low": low, "times_high": high},
    )
