"""What fine-tuning did to the weights: figures for each of them (`spectrum`), read from folders (`weights`), drawn."""
