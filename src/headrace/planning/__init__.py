"""Floor one, pure values: model, machine, plan, cost, simulation, timeline. No torch, no threads."""
