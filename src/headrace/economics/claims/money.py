"""Claims about money: the price of a page, writers, training against inference, what rented devices make of it."""

from __future__ import annotations

from headrace.economics.claims.facts import model_fact, predicted_tokens_per_s
from headrace.economics.claims.ledger import Default, Ledger, Outcome, checks
from headrace.economics.owning import crossover_tokens
from headrace.units import format_count, format_number

_WORDS_PER_PAGE = 750
_LIST_PRICES = "a public price list of hosted models (litellm's), output tokens"

ASSUMPTIONS: dict[str, Default] = {
    "gpt1_parameters": model_fact("gpt-1", "parameters"),
    "gpt3_parameters": model_fact("gpt-3", "parameters"),
    "ft_gpt3_predicted_tokens_per_s": predicted_tokens_per_s(
        "gpt-3", "8xa100-80", sequences=16, prompt_tokens=512, generate_tokens=32, tensor=8
    ),
    "v100_opt175b_predicted_tokens_per_s": predicted_tokens_per_s(
        "opt-175b", "v100-32", sequences=64, prompt_tokens=512, generate_tokens=32, streamed=True
    ),
}


def _near(value: float, claimed: float) -> bool:
    return abs(value / claimed - 1) <= 0.1


@checks("page-price")
def _page(given: Ledger) -> Outcome:
    tokens, listed_usd = given("tokens_per_750_words"), given("api_usd_per_1k")
    usd = tokens / 1000 * listed_usd
    later = {
        "2022": given("api_2022_usd_per_1k"),
        "cheap successor": given("cheap_successor_usd_per_1k"),
        "frontier": given("frontier_usd_per_1k"),
        "open model": given("open_model_usd_per_1k"),
    }
    held = _near(usd, given("claimed_usd_per_page"))
    return Outcome(
        "holds, at the price of 2021" if held else f"false: {usd:.3g} $",
        f"{format_count(tokens)} tokens x {listed_usd:g} $ per 1,000 = {usd:.3g} $ per 750 words. Since then: "
        + ", ".join(f"{name} {tokens / 1000 * each:.3g} $" for name, each in later.items()),
        {
            "usd_per_750_words": usd,
            **{f"usd_per_750_words {name}": tokens / 1000 * each for name, each in later.items()},
        },
    )


@checks("page-price-1000x")
def _page_larger(given: Ledger) -> Outcome:
    page = given("tokens_per_750_words") / 1000 * given("api_usd_per_1k")
    growth, exponent = given("growth"), given("price_exponent")
    usd = page * growth**exponent
    words = _WORDS_PER_PAGE
    held = _near(usd, given("claimed_usd_per_page_1000x"))
    return Outcome(
        "holds, if price is proportional to dense parameters (same hardware, same batch)"
        if held
        else f"false: {usd:.3g} $",
        f"{page:.3g} $ x {growth:g}^{exponent:g} = {format_number(usd)} $ per {words} words, {usd / words:.3g} $ per "
        f"word, for {format_number(growth * given('gpt3_parameters'))} parameters",
        {"usd_per_750_words": usd, "usd_per_word": usd / words},
    )


@checks("growth")
def _growth(given: Ledger) -> Outcome:
    small, large = given("gpt1_parameters"), given("gpt3_parameters")
    ratio, claimed = large / small, given("growth")
    return Outcome(
        "holds" if 0.5 <= ratio / claimed <= 2 else f"false: {format_number(ratio)} times",
        f"{format_number(large)} / {format_number(small)} parameters = {format_number(ratio)} times, against "
        f"{format_number(claimed)}",
        {"ratio": ratio},
    )


@checks("writer-price")
def _writer(given: Ledger) -> Outcome:
    usd, wage = given("claimed_usd_per_page_1000x"), given("writer_usd_per_h")
    low = wage * given("writer_h_per_page_low")
    by_word = _WORDS_PER_PAGE * given("freelance_usd_per_word")
    high = max(wage * given("writer_h_per_page_high"), by_word)
    verdict = "holds" if low <= usd <= high else f"false: a writer costs {low:.3g} to {high:.3g} $"
    return Outcome(
        verdict,
        f"{usd:g} $ buys {usd / wage:.3g} h at {wage:g} $/h; 750 words by a writer cost {low:.3g} $ "
        f"({given('writer_h_per_page_low'):g} h) to {high:.3g} $ (freelance, or "
        f"{given('writer_h_per_page_high'):g} h); "
        f"{usd:g} $ is {usd / _WORDS_PER_PAGE:.2g} $ per word",
        {"hours": usd / wage, "usd_low": low, "usd_high": high},
    )


@checks("mostly-inference")
def _mostly_inference(given: Ledger) -> Outcome:
    trained, per_day, days = given("training_tokens"), given("tokens_per_day"), given("service_days")
    served = per_day * days
    share = served / (served + crossover_tokens(trained))
    return Outcome(
        f"{'holds' if share > 0.5 else 'false'}: {share:.0%} of the operations are inference",
        f"2 N x {format_number(served)} tokens served in {days:g} days, against 6 N x {format_number(trained)} "
        f"trained: {share:.1%}. (OpenAI wrote in 2018 that most neural-network compute goes into inference; Epoch "
        "finds that labs that spend best divide it about equally.)",
        {"inference_share": share, "served_tokens": served},
    )


@checks("crossover")
def _crossover(given: Ledger) -> Outcome:
    trained, per_day = given("training_tokens"), given("tokens_per_day")
    tokens = crossover_tokens(trained)
    days = tokens / per_day
    training, inference = given("training_share_of_peak"), given("inference_share_of_peak")
    hours = crossover_tokens(trained, training_share=training, inference_share=inference)
    return Outcome(
        f"inference has cost as much as training after {days:.3g} days",
        f"6 N D = 2 N T: T = 3 x {format_number(trained)} = {format_number(tokens)} tokens; at "
        f"{format_number(per_day)} a day, {format_number(days)} days"
        f". In device hours sooner where less of the peak is reached: x {inference:g} / {training:g} = "
        f"{format_number(hours)} tokens, {hours / per_day:.3g} days",
        {"tokens": tokens, "days": days, "tokens_in_money": hours, "days_in_money": hours / per_day},
    )


def _cost_per_1k(usd_per_h: float, tokens_per_s: float) -> float:
    return usd_per_h / 3600 / tokens_per_s * 1000


def _against_price(given: Ledger, usd: float, arithmetic: str, values: dict[str, float]) -> Outcome:
    api = given("api_usd_per_1k")
    verdict = "below the 2021 price" if usd < 0.9 * api else "about the 2021 price" if usd < 1.1 * api else "above it"
    return Outcome(
        f"{verdict}: {usd:.2g} $ per 1,000 tokens against {api:g} $", arithmetic, {"usd_per_1k_tokens": usd, **values}
    )


@checks("resident-cost")
def _resident_cost(given: Ledger) -> Outcome:
    rent, rate = given("a100_rent_usd_per_h"), given("ft_gpt3_tokens_per_s")
    predicted = given("ft_gpt3_predicted_tokens_per_s")
    usd = _cost_per_1k(8 * rent, rate)
    return _against_price(
        given,
        usd,
        f"8 x {rent:g} $/h / 3600 / {rate:g} tokens/s x 1,000 = {usd:.3g} $; predicted for present software: "
        f"{predicted:.3g} tokens/s",
        {"usd_per_1k_tokens_predicted": _cost_per_1k(8 * rent, predicted)},
    )


@checks("streamed-cost")
def _streamed_cost(given: Ledger) -> Outcome:
    rent, rate = given("v100_rent_usd_per_h"), given("v100_opt175b_tokens_per_s")
    predicted = given("v100_opt175b_predicted_tokens_per_s")
    usd = _cost_per_1k(rent, rate)
    return _against_price(
        given,
        usd,
        f"{rent:g} $/h / 3600 / {rate:g} tokens/s x 1,000 = {usd:.3g} $; predicted: {predicted:.3g} tokens/s",
        {"usd_per_1k_tokens_predicted": _cost_per_1k(rent, predicted)},
    )


@checks("streamed-cost-4bit")
def _streamed_cost_4bit(given: Ledger) -> Outcome:
    rent, rate = given("a6000_rent_usd_per_h"), given("a6000_opt175b_tokens_per_s")
    usd = _cost_per_1k(rent, rate)
    return _against_price(given, usd, f"{rent:g} $/h / 3600 / {rate:g} tokens/s x 1,000 = {usd:.3g} $", {})
