"""Decoder-only transformers (Llama, Mistral, Qwen2, Qwen3) on packed tokens, and the files they come from."""
