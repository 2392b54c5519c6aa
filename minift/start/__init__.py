"""What some adapters need to know of the base before training: spectra of weights and of gradients."""
