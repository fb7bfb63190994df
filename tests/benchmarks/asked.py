"""Rows as an evaluation makes them, from (question, images, reply)."""

from latent_jax.benchmarks.items import Item, ScoredItem


def row(benchmark, question: dict, reply: str, scorer: str, images: int = 1, key: str = "") -> ScoredItem:
    benchmark.check(question, images)
    item = Item(question["id"], question, 0, images, benchmark.cluster(question, key or question["id"]))
    parsed = benchmark.parse(reply, question, scorer)
    hidden = benchmark.answer(question) is None
    return ScoredItem(item, reply, parsed, None if hidden else benchmark.correct(parsed, question, scorer))


def percent(fractions: dict) -> dict:
    """What the reference says, as a report says it."""
    return {name: 100 * value for name, value in fractions.items()}


def values(report: dict) -> dict:
    return {name: estimate.value for name, estimate in report.items()}
