"""Money: seconds on a machine at its price."""


def cost_usd(seconds: float, usd_per_hour: float | None) -> float | None:
    """Dollars for `seconds`; None where no price is set."""
    return None if usd_per_hour is None else seconds / 3600 * usd_per_hour
