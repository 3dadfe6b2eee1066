"""Published figures with their sources, and what turns the data behind them into the engine's rows and suites."""
