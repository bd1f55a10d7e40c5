"""The shapes world: scenes, their pictures, the annotators who vote on them, and the oracle who knows why."""
