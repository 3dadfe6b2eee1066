"""The balance loss of models with experts, which the engine does not train.

It is a product of means over all tokens that stand in a forward together, so it would depend on how a step is cut into
micro-batches and packs, padding included (traps 1 and 8). What it is for, that routers use all experts, concerns
weights that an adapter leaves frozen.
"""

from torch import nn

from .group import Group

ASKED = "output_router_logits"
ROUTERS = ("gate", "router", "gating", "router_gate")


def without_balance_loss(model: nn.Module) -> bool:
    """Switch the balance loss off in every config of a model, in place. False where none asked for it."""
    configs = {id(found): found for m in model.modules() if (found := getattr(m, "config", None)) is not None}
    asked = False
    for settings in configs.values():
        parts = [getattr(settings, name, None) for name in getattr(settings, "sub_configs", {})]
        for part in (settings, *parts):
            if getattr(part, ASKED, False):
                asked = True
                setattr(part, ASKED, False)
    return asked


def told_of_balance(group: Group) -> str:
    """What run.json says where the model asked for a balance loss."""
    told = f"the router's balance loss ({ASKED} in the model's config.json) is not part of the loss"
    trained = trained_routers(group)
    if not trained:
        return f"{told}: router weights are frozen"
    return (
        f"{told}, although {len(trained)} tensors of routers train ({trained[0]}), so that nothing "
        "keeps the experts in balance; freeze them with training.frozen or adapter.targets"
    )


def trained_routers(group: Group) -> list[str]:
    """Names of trained tensors that belong to routers."""
    names = {name for member in group.members for name in member.tensors}
    return sorted(name for name in names if set(name.split(".")) & set(ROUTERS))
