"""Step batching: rollouts of many requests share engine calls, whatever their step, plan, seed or number of steps."""
