"""Built-in chat formats. A .jinja file is a format Jinja can say; a module is one it cannot, and offers

    STOP_TOKENS: tuple[str, ...]
    pieces(messages, tools, add_generation_prompt) -> Iterator[Piece]
"""
