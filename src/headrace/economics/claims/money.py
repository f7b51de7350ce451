"""Claims about money: the price of a page, writers, training against inference, what rented devices make of it."""

from __future__ import annotations

from headrace.economics.claims.facts import model_fact, predicted_tokens_per_s
from headrace.economics.claims.ledger import Assumption, Claim, Default, Ledger, Outcome
from headrace.planning import price
from headrace.units import format_count, format_number

_LIST_PRICES = "a public price list of hosted models (litellm's), output tokens"

ASSUMPTIONS: dict[str, Default] = {
    "api_usd_per_1k": Assumption(0.06, "price list of the largest GPT-3, 2021"),
    "api_2022_usd_per_1k": Assumption(0.02, "the same model from September 2022, recalled"),
    "cheap_successor_usd_per_1k": Assumption(0.002, f"gpt-3.5-turbo-instruct; {_LIST_PRICES}"),
    "frontier_usd_per_1k": Assumption(0.03, f"gpt-5.5; {_LIST_PRICES}"),
    "open_model_usd_per_1k": Assumption(0.00042, f"deepseek-chat; {_LIST_PRICES}"),
    "tokens_per_750_words": Assumption(1000, "OpenAI's own rule"),
    "claimed_usd_per_page": Assumption(0.06, "what the post says"),
    "claimed_usd_per_page_1000x": Assumption(60, "what the post says"),
    "growth": Assumption(1000, "what the post supposes"),
    "price_exponent": Assumption(1, "price in proportion to parameters to this power; 1: same hardware, same batch"),
    "gpt1_parameters": model_fact("gpt-1", "parameters"),
    "gpt3_parameters": model_fact("gpt-3", "parameters"),
    "writer_usd_per_h": Assumption(32.27, "median of writers and authors in the United States, BLS 2020"),
    "writer_h_per_page_low": Assumption(1, "a seasoned writer's 750 words: 1 to 2 hours"),
    "writer_h_per_page_high": Assumption(4, "research and revision included"),
    "freelance_usd_per_word": Assumption(0.50, "upper end of usual freelance rates (0.10 to 0.50), recalled"),
    "training_tokens": Assumption(300e9, "GPT-3's training set as passed over (Brown et al. 2020)"),
    "training_share_of_peak": Assumption(0.4, "large training runs; estimate"),
    "inference_share_of_peak": Assumption(0.1, "decoding at a promised speed; estimate (`headrace fleet` computes it)"),
    "tokens_per_day": Assumption(100e9, "what OpenAI said it served per day in early 2024 (Epoch)"),
    "service_days": Assumption(365, "how long a model is served; estimate"),
    "a100_rent_usd_per_h": Assumption(1.5, "between the lowest offers of 2025 for A100 of 40 and 80 GB"),
    "ft_gpt3_tokens_per_s": Assumption(
        138, "FasterTransformer, GPT 175B, 8 A100-80, batch 16, 512 in, 32 out: measured"
    ),
    "ft_gpt3_predicted_tokens_per_s": predicted_tokens_per_s(
        "gpt-3", "8xa100-80", sequences=16, prompt_tokens=512, generate_tokens=32, tensor=8
    ),
    "v100_rent_usd_per_h": Assumption(2.55, "GCP, March 2025"),
    "v100_opt175b_tokens_per_s": Assumption(2.0, "ZeRO-Inference, OPT-175B from host memory, one V100, batch 64"),
    "v100_opt175b_predicted_tokens_per_s": predicted_tokens_per_s(
        "opt-175b", "v100-32", sequences=64, prompt_tokens=512, generate_tokens=32, streamed=True
    ),
    "a6000_rent_usd_per_h": Assumption(0.45, "lowest offer of March 2025"),
    "a6000_opt175b_tokens_per_s": Assumption(2.26, "ZeRO-Inference, OPT-175B in 4 bits from host memory, one A6000"),
}


def _near(value: float, claimed: float) -> bool:
    return abs(value / claimed - 1) <= 0.1


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


def _page_larger(given: Ledger) -> Outcome:
    page = given("tokens_per_750_words") / 1000 * given("api_usd_per_1k")
    growth, exponent = given("growth"), given("price_exponent")
    usd = page * growth**exponent
    words = price.WORDS_PER_PAGE
    held = _near(usd, given("claimed_usd_per_page_1000x"))
    return Outcome(
        "holds, if price is proportional to dense parameters (same hardware, same batch)"
        if held
        else f"false: {usd:.3g} $",
        f"{page:.3g} $ x {growth:g}^{exponent:g} = {format_number(usd)} $ per {words} words, {usd / words:.3g} $ per "
        f"word, for {format_number(growth * given('gpt3_parameters'))} parameters",
        {"usd_per_750_words": usd, "usd_per_word": usd / words},
    )


def _growth(given: Ledger) -> Outcome:
    small, large = given("gpt1_parameters"), given("gpt3_parameters")
    ratio, claimed = large / small, given("growth")
    return Outcome(
        "holds" if 0.5 <= ratio / claimed <= 2 else f"false: {format_number(ratio)} times",
        f"{format_number(large)} / {format_number(small)} parameters = {format_number(ratio)} times, against "
        f"{format_number(claimed)}",
        {"ratio": ratio},
    )


def _writer(given: Ledger) -> Outcome:
    usd, wage = given("claimed_usd_per_page_1000x"), given("writer_usd_per_h")
    low = wage * given("writer_h_per_page_low")
    by_word = price.WORDS_PER_PAGE * given("freelance_usd_per_word")
    high = max(wage * given("writer_h_per_page_high"), by_word)
    verdict = "holds" if low <= usd <= high else f"false: a writer costs {low:.3g} to {high:.3g} $"
    return Outcome(
        verdict,
        f"{usd:g} $ buys {usd / wage:.3g} h at {wage:g} $/h; 750 words by a writer cost {low:.3g} $ "
        f"({given('writer_h_per_page_low'):g} h) to {high:.3g} $ (freelance, or "
        f"{given('writer_h_per_page_high'):g} h); "
        f"{usd:g} $ is {usd / price.WORDS_PER_PAGE:.2g} $ per word",
        {"hours": usd / wage, "usd_low": low, "usd_high": high},
    )


def _mostly_inference(given: Ledger) -> Outcome:
    trained, per_day, days = given("training_tokens"), given("tokens_per_day"), given("service_days")
    served = per_day * days
    share = served / (served + price.crossover_tokens(trained))
    return Outcome(
        f"{'holds' if share > 0.5 else 'false'}: {share:.0%} of the operations are inference",
        f"2 N x {format_number(served)} tokens served in {days:g} days, against 6 N x {format_number(trained)} "
        f"trained: {share:.1%}. (OpenAI wrote in 2018 that most neural-network compute goes into inference; Epoch "
        "finds that labs that spend best divide it about equally.)",
        {"inference_share": share, "served_tokens": served},
    )


def _crossover(given: Ledger) -> Outcome:
    trained, per_day = given("training_tokens"), given("tokens_per_day")
    tokens = price.crossover_tokens(trained)
    days = price.days_until(tokens, tokens_per_day=per_day)
    training, inference = given("training_share_of_peak"), given("inference_share_of_peak")
    hours = price.crossover_tokens(trained, training_share=training, inference_share=inference)
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


def _streamed_cost_4bit(given: Ledger) -> Outcome:
    rent, rate = given("a6000_rent_usd_per_h"), given("a6000_opt175b_tokens_per_s")
    usd = _cost_per_1k(rent, rate)
    return _against_price(given, usd, f"{rent:g} $/h / 3600 / {rate:g} tokens/s x 1,000 = {usd:.3g} $", {})


CLAIMS = (
    Claim(name="page-price", says="750 words by GPT-3 cost six cents", check=_page),
    Claim(
        name="page-price-1000x", says="by a model a thousand times as large they would cost 60 $", check=_page_larger
    ),
    Claim(name="growth", says="a thousandfold is about what lies between GPT-1 and GPT-3", check=_growth),
    Claim(name="writer-price", says="60 $ is about what a good human writer takes", check=_writer),
    Claim(
        name="mostly-inference", says="most of the compute goes into inference, not training", check=_mostly_inference
    ),
    Claim(name="crossover", says="(added) when inference has cost as much as training", check=_crossover),
    Claim(
        name="resident-cost",
        says="(added) eight rented A100 that hold a GPT-3-size model, against the price of 2021",
        check=_resident_cost,
    ),
    Claim(
        name="streamed-cost",
        says="(added) one rented V100 that streams a GPT-3-size model in 16 bits, against that price",
        check=_streamed_cost,
    ),
    Claim(
        name="streamed-cost-4bit",
        says="(added) one rented A6000 that streams it in 4 bits, against that price",
        check=_streamed_cost_4bit,
    ),
)
