"""Parameter-efficient methods: one file per method, `inject` puts them into a model."""
