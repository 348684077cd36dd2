"""The sources of a run: what was asked of each, and what was really read.

What was read stands in the metrics, counted from the batches. The trap is to reckon it from weights and steps again,
which gives what was asked a second time and agrees with it whatever happened.
"""

from typing import Any

from cheaptrain.report.account import Account


def data_read(account: Account) -> list[dict[str, Any]]:
    """Each source: what was asked and what was read. Epochs and prepared tokens are None where no plan was written
    down."""
    planned = {source["name"]: source for source in account.planned.get("sources", ())}
    read, total = account.source_tokens(), sum(account.source_tokens().values())
    weights = {
        source["name"]: source["weight"]
        for source in (account.recipe.get("data") or {}).get("sources", ())
        if source.get("weight")
    }
    numbers = [weight for weight in weights.values() if isinstance(weight, int | float)]
    rows = []
    for name in dict.fromkeys([*weights, *read]):
        plan, tokens, weight = planned.get(name, {}), read.get(name, 0), weights.get(name)
        asked = plan.get("share")
        if asked is None and isinstance(weight, int | float) and len(numbers) == len(weights):
            asked = weight / sum(numbers)
        epochs = None
        if plan.get("epochs") is not None and plan.get("tokens"):
            epochs = plan["epochs"] * tokens / plan["tokens"]
        rows.append(
            {
                "name": name,
                "share_asked": asked,
                "share_read": tokens / total if total else 0.0,
                "tokens_asked": plan.get("tokens"),
                "tokens": tokens,
                "prepared_tokens": plan.get("prepared_tokens"),
                "epochs": epochs,
                "max_epochs": plan.get("max_epochs"),
            }
        )
    return rows
