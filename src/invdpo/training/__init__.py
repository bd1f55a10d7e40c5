"""Train an arm: the loop, its optimizers, its data order, and a state that survives interruption."""
