"""The market, tried out: learning bidders, cartels, cheaters and crashes against each pay rule.

::

    population ──▶ learning ──▶ comparison ──▶ table
        │             │
        │             └─ rules (vectorised clearing), counterfactual (what each action earns)
        └─▶ work (units done down one ladder, in simulated seconds)
    oracle: what a lie or a shill gains, for tests and documents

Nothing here decides anything in a real market.  Prices and payments are integer micros;
ratios, seconds and a learner's weights are floats.
"""
