"""Training objectives: (model, batch) -> sum of the loss and its weight. Nothing here knows about ranks or shards."""
